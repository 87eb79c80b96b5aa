"""`python -m jobs.train`."""

from jobs.commands.stage import main
from jobs.stages.train import STAGE

if __name__ == "__main__":
    main(STAGE)
