"""Schedules: records, the server, the lease."""
