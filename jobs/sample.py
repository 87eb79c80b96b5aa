"""`python -m jobs.sample`."""

from jobs.stages.sample import VERB

if __name__ == "__main__":
    VERB.main()
