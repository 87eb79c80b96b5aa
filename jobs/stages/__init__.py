"""The stages of a pipeline, one per file."""
