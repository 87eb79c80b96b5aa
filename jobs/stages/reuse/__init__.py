"""Shards made of what is new, and of rows copied from earlier artifacts of the same kind."""
