"""`python -m jobs.preprocess`."""

from jobs.commands.stage import main
from jobs.stages.preprocess import STAGE

if __name__ == "__main__":
    main(STAGE)
