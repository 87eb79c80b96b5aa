"""The Ray session, progress, and how failures are reported."""
