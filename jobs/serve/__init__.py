"""Serve a registered model over HTTP on Ray Serve."""
