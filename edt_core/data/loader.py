"""Global batches of a training's latents, cut to one rank's share.

Legend: B global batch, n this rank's share of it (about B / world size), C latent channels, h latent height and width.
"""

import sys
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.data.latents import LatentDataset, NumberFormat
from edt_core.data.latents.number_format import all_finite
from edt_core.data.randomness import batch_indices, mirror_draws
from edt_core.data.subsets import share
from edt_core.errors import UserError
from edt_core.store.digests import listing


@dataclass(frozen=True)
class LatentBatch:
    """One rank's share of global batch `step`.

    posterior [n, 2, C, h, h] (mean, std; of the mirror image if `mirror`), float32, or the half precision that the
    latents are stored in: the step widens it on the device. labels int64 [n], mirror bool [n], indices int64 [n]: rows
    of the latent shards, or -1 for streamed samples, which have `keys` instead. tokens float16 [n, T, K] of the same
    sides, if they are read.
    """

    step: int
    indices: NDArray[np.int64]
    mirror: NDArray[np.bool_]
    posterior: Tensor
    labels: Tensor
    keys: tuple[str, ...] = ()
    tokens: Tensor | None = None


@dataclass(frozen=True)
class BatchPlan:
    """The division of global batches among ranks. Raises UserError if there are fewer samples than ranks."""

    seed: int
    global_batch_size: int
    mirror_prob: float
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where the batches go

    def __post_init__(self) -> None:
        if self.global_batch_size < self.world_size:
            raise UserError(
                f"the global batch has {self.global_batch_size} samples, less than the {self.world_size} workers; use "
                "fewer workers or a larger batch"
            )
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)

    @property
    def share(self) -> slice:
        """This rank's part of the global batch."""
        return share(self.global_batch_size, self.rank, self.world_size)

    def indices(self, step: int, num_samples: int) -> NDArray[np.int64]:
        """This rank's rows int64 [n] at a step."""
        return batch_indices(self.seed, step, self.global_batch_size, num_samples)[self.share]

    def mirror(self, step: int) -> NDArray[np.bool_]:
        """Which of this rank's samples are mirrored at a step: bool [n]."""
        return mirror_draws(self.seed, step, self.share, self.mirror_prob)


class Buffers:
    """Arrays [n, 2, C, h, h] of stored numbers to gather into, reused when nothing refers to them.

    For a GPU they are page-locked, and torch caches them for reuse. On the CPU, fresh memory of this size would be new
    pages each time, which the kernel clears: more work than the gather itself.
    """

    def __init__(self, plan: BatchPlan, latent_shape: tuple[int, int, int], numbers: NumberFormat) -> None:
        self.device, self.shape = plan.device, (plan.share.stop - plan.share.start, 2, *latent_shape)
        self.numbers = numbers
        self._arrays: list[NDArray[Any]] = []

    def empty(self) -> tuple[Tensor, NDArray[Any]]:
        """An uninitialised tensor that nothing else refers to, and the array of the same memory."""
        if self.device.type == "cuda":
            with on_device(self.device):
                tensor = torch.empty(self.shape, dtype=self.numbers.tensor, pin_memory=True)
            return tensor, self.numbers.array_of(tensor)
        # Three references are those of the list, the loop and this call; each tensor or view of an array adds one.
        free = next((array for array in self._arrays if sys.getrefcount(array) == 3), None)
        if free is None:
            free = np.empty(self.shape, self.numbers.array)
            self._arrays.append(free)
        return self.numbers.tensor_of(free), free


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Context for allocating page-locked memory for a device: a thread would otherwise open a context on GPU 0."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def require_finite(batch: LatentBatch) -> None:
    """Raise UserError with the names of latents that are not finite: they would ruin the whole model."""
    if all_finite(batch.posterior):
        return
    positions = np.flatnonzero(~torch.isfinite(batch.posterior).flatten(1).all(1).numpy())
    if not len(positions):
        return
    raise UserError(
        f"{len(positions)} latents of step {batch.step} are not finite ({sample_names(batch, positions)}); encode the "
        "images again"
    )


def sample_names(batch: LatentBatch, places: NDArray[np.int64]) -> str:
    """The samples at some positions of a batch, by their keys or else their rows in the data set, for a message."""
    ids = [batch.keys[i] for i in places] if batch.keys else [str(row) for row in batch.indices[places]]
    return f"{'keys' if batch.keys else 'rows'} {listing(ids, ', ')}"


def latent_batches(dataset: LatentDataset, plan: BatchPlan, start_step: int = 0) -> Generator[LatentBatch, None, None]:
    """Endless batches of steps start_step, start_step + 1, ...: a pure function of the plan and the step.

    Epochs are concatenated: no row is dropped, and each epoch contains each row once.
    """
    step, buffers = start_step, Buffers(plan, dataset.info.latent_shape, dataset.info.numbers)
    while True:
        indices, mirror = plan.indices(step, len(dataset)), plan.mirror(step)
        posterior, array = buffers.empty()
        _, labels = dataset.gather(indices, mirror, array)
        del array  # only the batch may refer to a buffer in use
        yield LatentBatch(step, dataset.origin(indices), mirror, posterior, torch.from_numpy(labels))
        step += 1
