"""The training loop and its parts; it runs without Ray."""
