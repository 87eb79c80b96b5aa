"""The configuration of a pipeline: its schema, its checks and its reference page."""
