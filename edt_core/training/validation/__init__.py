"""Validation during a training: the loss on held-out images, and what its curve says."""
