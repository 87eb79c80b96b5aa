"""Runs and artifacts in MLflow."""
