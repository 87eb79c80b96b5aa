"""`python -m jobs.encode`."""

from jobs.stages.encode import VERB

if __name__ == "__main__":
    VERB.main()
