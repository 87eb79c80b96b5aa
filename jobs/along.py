"""`python -m jobs.along`."""

from jobs.commands.stage import main
from jobs.stages.along import STAGE

if __name__ == "__main__":
    main(STAGE)
