"""The configuration of a pipeline: schema, checks, the reference page."""
