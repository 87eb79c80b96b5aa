"""`python -m jobs.reference`."""

from jobs.commands.stage import main
from jobs.stages.reference import STAGE

if __name__ == "__main__":
    main(STAGE)
