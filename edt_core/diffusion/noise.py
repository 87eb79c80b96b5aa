"""Noise for evaluation: a function of the seed and the sample's index, whichever batch or worker has it.

Each draw has a generator of its own, so nothing depends on the order of calls either.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edt_core.data.prefetch import prefetched

LABEL_DRAW = 2**32 - 1  # the draw of a sample's label: a noise's number is below it


def sample_noise(
    seed: int, indices: Sequence[int], shape: Sequence[int], draw: int = 0, *, pin: bool = False
) -> Tensor:
    """Standard normal noise for the samples of the given indices, float32 [len(indices), *shape] on the CPU.

    Row i depends on (seed, indices[i], draw) and the shape alone. Draw 0 is the chain's start, draw 1 + s the
    noise of its step s. numpy makes it, because a torch generator uses 32 bits of its seed only: among the
    50,000 samples of an evaluation two would likely share their noise. With `pin` it lies in page-locked memory,
    which a GPU copies from without the host waiting.
    Raises ValueError for negative seed, index or draw, and for a draw that is not a noise's.
    """
    if min(seed, draw, *indices) < 0 or draw >= LABEL_DRAW:
        raise ValueError(
            f"seed {seed}, draw {draw} and sample indices from {min(indices, default=0)} must not be "
            f"negative, and the draw below {LABEL_DRAW}. Count samples from 0."
        )
    noise = torch.empty((len(indices), *shape), pin_memory=pin)
    for row, index in zip(noise.numpy(), indices, strict=True):
        sequence = np.random.SeedSequence(seed, spawn_key=(int(index), draw))
        np.random.Generator(np.random.PCG64(sequence)).standard_normal(dtype=np.float32, out=row)
    return noise


@dataclass(frozen=True)
class SampleNoise:
    """The noises of one batch of samples, to pass to `sample`. shape is that of one sample, [C, H, W]."""

    seed: int
    indices: Sequence[int]
    shape: Sequence[int]
    device: torch.device | str = "cpu"

    def initial(self) -> Tensor:
        """The chain's start, float32 [N, C, H, W]."""
        return self._there(self._made(0))

    def __call__(self, step: int) -> Tensor:
        """The noise of a step, float32 [N, C, H, W]; steps count from 0 at the noisiest."""
        return self._there(self._made(1 + step))

    @contextmanager
    def ahead(self, count: int, depth: int = 2) -> Iterator[Callable[[int], Tensor]]:
        """The same noises, bit for bit, of steps 0..count - 1 asked for in order: a thread makes the next `depth`.

        numpy lets other threads run while it draws, so a model need not wait for its noise. Leaving the context ends
        the thread. Asking out of order raises ValueError.
        """
        with closing(prefetched(((step, self._made(1 + step)) for step in range(count)), depth)) as coming:

            def noise(step: int) -> Tensor:
                made, host = next(coming, (None, None))
                if made != step or host is None:
                    raise ValueError(
                        f"noise of step {step} where that of {made} is next: ask for 0..{count - 1} in order"
                    )
                return self._there(host)

            yield noise

    def _made(self, draw: int) -> Tensor:
        pin = torch.device(self.device).type == "cuda"
        return sample_noise(self.seed, self.indices, self.shape, draw, pin=pin)

    def _there(self, host: Tensor) -> Tensor:
        """On the device. Pinned memory is not used again before a copy from it is done: its allocator sees to that."""
        return host.to(self.device, non_blocking=True)
