"""The method: EDT models, diffusion, data formats, training and metrics. Imports neither Ray nor MLflow."""
