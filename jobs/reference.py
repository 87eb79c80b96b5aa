"""`python -m jobs.reference`."""

from jobs.commands.stage import main
from jobs.stages.reference import VERB

if __name__ == "__main__":
    main(VERB)
