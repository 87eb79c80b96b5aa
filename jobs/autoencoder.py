"""`python -m jobs.autoencoder`."""

from jobs.commands.stage import main
from jobs.stages.autoencoder import STAGE

if __name__ == "__main__":
    main(STAGE)
