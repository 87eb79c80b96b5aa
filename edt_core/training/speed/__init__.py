"""A training step made faster by a compiler: the parts of the model, and the update of the weights."""
