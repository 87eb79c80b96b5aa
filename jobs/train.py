"""`python -m jobs.train`."""

from jobs.commands.stage import main
from jobs.stages.train import VERB

if __name__ == "__main__":
    main(VERB)
