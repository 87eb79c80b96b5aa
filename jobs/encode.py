"""`python -m jobs.encode`."""

from jobs.commands.stage import main
from jobs.stages.encode import STAGE

if __name__ == "__main__":
    main(STAGE)
