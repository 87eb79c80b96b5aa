"""`python -m jobs.reference`."""

from jobs.stages.reference import VERB

if __name__ == "__main__":
    VERB.main()
