"""Versions that were made from another model to be faster: distilled from their teacher, or pruned."""
