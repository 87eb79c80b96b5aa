"""Depth pruning: which blocks of a model to leave out is learnt (TinyFusion, arXiv 2412.01199)."""
