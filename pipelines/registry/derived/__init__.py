"""Versions that are made from other versions, without training."""
