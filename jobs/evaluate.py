"""`python -m jobs.evaluate`."""

from jobs.stages.evaluate import VERB

if __name__ == "__main__":
    VERB.main()
