"""`python -m jobs.validate`."""

from jobs.commands.stage import main
from jobs.stages.validate import STAGE

if __name__ == "__main__":
    main(STAGE)
