"""Schedules: their records, the server that runs them, and the lease on a store."""
