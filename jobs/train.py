"""`python -m jobs.train`."""

from jobs.stages.train import VERB

if __name__ == "__main__":
    VERB.main()
