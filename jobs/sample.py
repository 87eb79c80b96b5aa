"""`python -m jobs.sample`."""

from jobs.commands.stage import main
from jobs.stages.sample import STAGE

if __name__ == "__main__":
    main(STAGE)
