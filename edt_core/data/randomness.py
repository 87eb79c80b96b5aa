"""Random numbers of a training as pure functions: the order of its data by (seed, epoch), the rest by (seed, step).

They never depend on rank, worker count or time.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

# One generator per kind of draw: a new kind does not change the draws of the others.
_STREAMS = {"mirror": 0, "posterior": 1, "labels": 2, "timesteps": 3, "noise": 4, "masks": 5}


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """A permutation of 0..num_samples-1 that depends only on (seed, epoch)."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(num_samples)
    order.setflags(write=False)
    return order


def batch_indices(seed: int, step: int, global_batch_size: int, num_samples: int) -> NDArray[np.int64]:
    """Rows of global batch `step`: positions step*B .. step*B+B-1 of the concatenated epochs.

    No row is dropped at the end of an epoch; a batch may contain the end of one epoch and the start of the next.
    """
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    epochs, places = positions // num_samples, positions % num_samples
    parts = [epoch_order(seed, int(epoch), num_samples)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def generator(seed: int, step: int, stream: str) -> torch.Generator:
    """The CPU generator of one kind of draw at one step."""
    state = np.random.SeedSequence([seed, step, _STREAMS[stream]]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def mirror_draws(seed: int, step: int, global_batch_size: int, mirror_prob: float) -> NDArray[np.bool_]:
    """Which samples of global batch `step` are mirror images: bool [B]."""
    uniform = torch.rand(global_batch_size, generator=generator(seed, step, "mirror"))
    return (uniform < mirror_prob).numpy()
