"""`python -m jobs.classifier`."""

from jobs.stages.classifier import VERB

if __name__ == "__main__":
    VERB.main()
