"""The stages of a pipeline, one a file: what each takes and makes."""
