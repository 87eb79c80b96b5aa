"""The order of training data: a pure function of (seed, position), never of rank, worker count or time."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """A permutation of 0..num_samples-1, a function of (seed, epoch) alone."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(num_samples)
    order.setflags(write=False)
    return order


def batch_indices(seed: int, step: int, global_batch_size: int, num_samples: int) -> NDArray[np.int64]:
    """Rows of global batch `step`: positions step*B .. step*B+B-1 of the epochs laid end to end.

    No row is dropped at the end of an epoch; a batch may hold the end of one and the start of the next.
    """
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    epochs, places = positions // num_samples, positions % num_samples
    parts = [epoch_order(seed, int(epoch), num_samples)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)
