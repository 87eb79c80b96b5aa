"""Registered models: gate, aliases, lookup, lineage, import, comparison, clean-up."""
