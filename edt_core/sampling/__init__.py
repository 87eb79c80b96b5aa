"""From a model to images: samplers, labels, grids, the diffusers pipeline, the exported program."""
