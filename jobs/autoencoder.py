"""`python -m jobs.autoencoder`."""

from jobs.stages.autoencoder import VERB

if __name__ == "__main__":
    VERB.main()
