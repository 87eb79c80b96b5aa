"""`python -m jobs.preprocess`."""

from jobs.stages.preprocess import VERB

if __name__ == "__main__":
    VERB.main()
