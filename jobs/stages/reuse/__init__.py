"""Rows of artifacts that were made before, as rows of a new artifact of the same kind."""
