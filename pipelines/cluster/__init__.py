"""Access to Ray clusters and MLflow servers from outside."""
