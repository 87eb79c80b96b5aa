"""Retraining: the champion of a model trained further on the images as they are now."""
