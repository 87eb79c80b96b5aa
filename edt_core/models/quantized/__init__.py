"""Models whose linear layers have quantised weights, and activations, by torchao."""
