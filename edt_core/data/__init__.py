"""Images in, latents out: image folders, WebDataset image shards, Arrow latent shards, and the order of training data.

One legend: N rows, C latent channels, h latent height and width, S image height and width in pixels.
"""
