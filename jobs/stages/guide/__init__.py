"""The model that samples are guided away from."""
