"""Noise for evaluation: a function of the seed and the sample's index, whichever batch or worker has it.

Each draw has a generator of its own, so nothing depends on the order of calls either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int], draw: int = 0) -> Tensor:
    """Standard normal noise for the samples of the given indices, float32 [len(indices), *shape] on the CPU.

    Row i depends on (seed, indices[i], draw) and the shape alone. Draw 0 is the chain's start, draw 1 + s the
    noise of its step s. numpy makes it, because a torch generator uses 32 bits of its seed only: among the
    50,000 samples of an evaluation two would likely share their noise.
    Raises ValueError for negative seed, index or draw.
    """
    if min(seed, draw, *indices) < 0:
        raise ValueError(
            f"seed {seed}, draw {draw} and sample indices from {min(indices, default=0)} must not be "
            "negative. Count samples from 0."
        )
    rows = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(rows, indices, strict=True):
        sequence = np.random.SeedSequence(seed, spawn_key=(int(index), draw))
        np.random.Generator(np.random.PCG64(sequence)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows)


@dataclass(frozen=True)
class SampleNoise:
    """The noises of one batch of samples, to pass to `sample`. shape is that of one sample, [C, H, W]."""

    seed: int
    indices: Sequence[int]
    shape: Sequence[int]
    device: torch.device | str = "cpu"

    def initial(self) -> Tensor:
        """The chain's start, float32 [N, C, H, W]."""
        return sample_noise(self.seed, self.indices, self.shape).to(self.device)

    def __call__(self, step: int) -> Tensor:
        """The noise of a step, float32 [N, C, H, W]; steps count from 0 at the noisiest."""
        return sample_noise(self.seed, self.indices, self.shape, 1 + step).to(self.device)
