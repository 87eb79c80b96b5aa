"""`python -m jobs.evaluate`."""

from jobs.commands.stage import main
from jobs.stages.evaluate import STAGE

if __name__ == "__main__":
    main(STAGE)
