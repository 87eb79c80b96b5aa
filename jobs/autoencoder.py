"""`python -m jobs.autoencoder`."""

from jobs.commands.stage import main
from jobs.stages.autoencoder import VERB

if __name__ == "__main__":
    main(VERB)
