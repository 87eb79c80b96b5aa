"""Commands that make a model from another one, without training."""
