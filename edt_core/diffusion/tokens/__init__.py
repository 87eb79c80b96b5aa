"""Masked tokens: an objective on the codes of an autoencoder, and its sampler, which unmasks them step by step."""
