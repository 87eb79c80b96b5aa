"""Versions that were distilled from another model, their teacher."""
