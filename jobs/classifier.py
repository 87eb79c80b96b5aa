"""`python -m jobs.classifier`."""

from jobs.commands.stage import main
from jobs.stages.classifier import VERB

if __name__ == "__main__":
    main(VERB)
