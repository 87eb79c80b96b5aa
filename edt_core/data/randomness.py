"""Random numbers of a training as pure functions: the order of its data by (seed, epoch), the rest by (seed, step).

They never depend on rank, worker count or time. Numbers of a row of the global batch come from the generator of its
chunk of 16 rows, so a rank draws only the chunks that contain its rows.

Legend: n = the rows that are drawn, places `rows` of the global batch.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# One generator per kind of draw: a new kind does not change the draws of the others.
_STREAMS = {
    "mirror": 0,
    "posterior": 1,
    "labels": 2,
    "timesteps": 3,
    "noise": 4,
    "masks": 5,
    "mask_ratios": 6,
    "masked_noise": 7,
    "align_shift": 8,
    "align_head": 9,
    "depth": 10,
}
ROWS_PER_CHUNK = 16  # part of what a training draws: another number is another training


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
    parts, left = [], global_batch_size
    epoch, place = divmod(step * global_batch_size, num_samples)
    while left:
        parts.append(epoch_order(seed, epoch, num_samples)[place : place + left])
        left -= len(parts[-1])
        epoch, place = epoch + 1, 0
    return np.concatenate(parts)


def generator(seed: int, step: int, stream: str) -> torch.Generator:
    """The CPU generator of one kind of draw at one step, for numbers that all rows share."""
    return torch.Generator().manual_seed(_seeds(seed, step, stream, 1)[0])


def normal_rows(out: Tensor, rows: slice, seed: int, step: int, stream: str) -> Tensor:
    """Fill `out`, float32 [n, ...] and contiguous, with the standard normal numbers of these rows; return it."""
    return _fill_rows(out, rows, _seeds(seed, step, stream, _chunks(rows)), _normal)


def uniform_rows(out: Tensor, rows: slice, seed: int, step: int, stream: str) -> Tensor:
    """Fill `out` [n, ...], contiguous, with the uniform numbers in [0, 1) of these rows; return it."""
    return _fill_rows(out, rows, _seeds(seed, step, stream, _chunks(rows)), _uniform)


def _normal(out: Tensor, source: torch.Generator) -> None:
    out.normal_(generator=source)


def _uniform(out: Tensor, source: torch.Generator) -> None:
    out.uniform_(generator=source)


def _chunks(rows: slice) -> int:
    """The number of chunks up to the last row."""
    return -(-rows.stop // ROWS_PER_CHUNK)


def _seeds(seed: int, step: int, stream: str, count: int) -> list[int]:
    """Seeds of the first `count` chunks.

    A torch generator uses 32 bits of its seed, so two chunks of a long training can have the same numbers, at other
    steps and for other samples.
    """
    states = np.random.SeedSequence([seed, step, _STREAMS[stream]]).generate_state(count, np.uint64)
    seeds: list[int] = (states >> np.uint64(1)).tolist()
    return seeds


def _fill_rows(
    out: Tensor, rows: slice, seeds: Sequence[int], fill: Callable[[Tensor, torch.Generator], None]
) -> Tensor:
    """Fill `out` chunk by chunk. A chunk is always drawn whole, so that a row does not depend on the rows beside it."""
    assert out.shape[0] == rows.stop - rows.start, (out.shape, rows)  # len(out) is slow
    assert out.is_contiguous(), out.stride()
    source = torch.Generator()
    for chunk in range(rows.start // ROWS_PER_CHUNK, _chunks(rows)):
        first = chunk * ROWS_PER_CHUNK
        begin, end = max(first, rows.start), min(first + ROWS_PER_CHUNK, rows.stop)
        target = out[begin - rows.start : end - rows.start]
        source.manual_seed(seeds[chunk])
        if end - begin == ROWS_PER_CHUNK:
            fill(target, source)
        else:
            whole = out.new_empty((ROWS_PER_CHUNK, *out.shape[1:]))
            fill(whole, source)
            target.copy_(whole[begin - first : end - first])
    return out


def mirror_draws(seed: int, step: int, rows: slice, mirror_prob: float) -> NDArray[np.bool_]:
    """Which of these rows of global batch `step` are mirror images: bool [n]."""
    uniform = uniform_rows(torch.empty(rows.stop - rows.start), rows, seed, step, "mirror")
    return (uniform < mirror_prob).numpy()
