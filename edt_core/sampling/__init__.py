"""From a model to pictures: samplers, labels, grids, the diffusers pipeline, the exported program."""
