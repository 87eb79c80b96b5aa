"""Images, image shards and latent shards, and the order of training data.

Legend: N rows, C latent channels, h latent height and width, S image height and width in pixels.
"""
