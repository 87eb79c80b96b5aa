"""Noise for evaluation: a function of the seed and the sample's index, independent of batch and worker.

Each draw has its own generator, so the noise does not depend on the order of calls either.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edt_core.data.prefetch import prefetched

LABEL_DRAW = 2**32 - 1  # the draw number of a sample's label; those of noise are below it


def sample_noise(
    seed: int | Sequence[int], indices: Sequence[int], shape: Sequence[int], draw: int = 0, *, pin: bool = False
) -> Tensor:
    """Standard normal noise for the samples `indices`, float32 [len(indices), *shape] on the CPU.

    `seed` is one for all samples, or one for each. Row i depends only on (its seed, indices[i], draw) and the shape.
    Draw 0 is the chain's start, draw 1 + s the noise of its step s. It is drawn with numpy, because a torch generator
    uses only 32 bits of its seed: among the 50,000 samples of an evaluation two would likely have the same noise. With
    `pin` it is in page-locked memory, for asynchronous copies to a GPU.
    Raises ValueError for a negative seed, index or draw, and for a draw from LABEL_DRAW on.
    """
    seeds = seed if isinstance(seed, Sequence) else [seed] * len(indices)
    if min(draw, *seeds, *indices) < 0 or draw >= LABEL_DRAW:
        raise ValueError(
            f"seed {seed}, draw {draw} and sample indices from {min(indices, default=0)} must not be "
            f"negative, and the draw below {LABEL_DRAW}. Count samples from 0."
        )
    noise = torch.empty((len(indices), *shape), pin_memory=pin)
    for row, own_seed, index in zip(noise.numpy(), seeds, indices, strict=True):
        sequence = np.random.SeedSequence(own_seed, spawn_key=(int(index), draw))
        np.random.Generator(np.random.PCG64(sequence)).standard_normal(dtype=np.float32, out=row)
    return noise


@dataclass(frozen=True)
class SampleNoise:
    """The noises of one batch of samples, to pass to `sample`. shape is that of one sample, [C, H, W].

    `seed` is one for all samples, or one for each.
    """

    seed: int | Sequence[int]
    indices: Sequence[int]
    shape: Sequence[int]
    device: torch.device | str = "cpu"

    def initial(self) -> Tensor:
        """The chain's start, float32 [N, C, H, W]."""
        return self._on_device(self._draw(0))

    def __call__(self, step: int) -> Tensor:
        """The noise of a step, float32 [N, C, H, W]; steps count from 0 at the noisiest."""
        return self._on_device(self._draw(1 + step))

    @contextmanager
    def ahead(self, count: int, depth: int = 2) -> Iterator[Callable[[int], Tensor]]:
        """Context with a function for the same noise, bit for bit, of steps 0..count - 1, called in order.

        A thread draws the next `depth` steps. numpy lets other threads run while it draws, so that a model need not
        wait for its noise. The thread ends with the context. Calls out of order raise ValueError.
        """
        with closing(prefetched(((step, self._draw(1 + step)) for step in range(count)), depth)) as draws:

            def noise(step: int) -> Tensor:
                next_step, host = next(draws, (None, None))
                if next_step != step or host is None:
                    raise ValueError(
                        f"noise of step {step} requested, but step {next_step} is next: request 0..{count - 1} in order"
                    )
                return self._on_device(host)

            yield noise

    def _draw(self, draw: int) -> Tensor:
        pin = torch.device(self.device).type == "cuda"
        return sample_noise(self.seed, self.indices, self.shape, draw, pin=pin)

    def _on_device(self, host: Tensor) -> Tensor:
        """Copy to the device. The allocator of pinned memory does not reuse it before the copy has completed."""
        return host.to(self.device, non_blocking=True)
