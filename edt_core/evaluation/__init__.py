"""Evaluation of samples: the protocol, published values, feature networks, metrics."""
