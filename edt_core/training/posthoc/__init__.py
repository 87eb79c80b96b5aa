"""Averages of the weights of any width, made after a training from snapshots (arXiv 2312.02696)."""
