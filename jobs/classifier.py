"""`python -m jobs.classifier`."""

from jobs.commands.stage import main
from jobs.stages.classifier import STAGE

if __name__ == "__main__":
    main(STAGE)
