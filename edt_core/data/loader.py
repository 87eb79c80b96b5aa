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

from edt_core.data.latents import LatentDataset
from edt_core.data.randomness import batch_indices, mirror_draws
from edt_core.data.subsets import share
from edt_core.errors import UserError
from edt_core.store.digests import listing


@dataclass(frozen=True)
class LatentBatch:
    """One rank's share of global batch `step`.

    posterior float32 [n, 2, C, h, h] (mean, std; of the mirror image where `mirror`), labels int64 [n], mirror bool
    [n], indices int64 [n]: rows of the data set, -1 where the samples were streamed, which have `keys` instead.
    """

    step: int
    indices: NDArray[np.int64]
    mirror: NDArray[np.bool_]
    posterior: Tensor
    labels: Tensor
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchPlan:
    """Who gets what of a global batch. Raises UserError where there is less than a sample for each rank."""

    seed: int
    global_batch_size: int
    mirror_prob: float
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where the batches go

    def __post_init__(self) -> None:
        if self.global_batch_size < self.world_size:
            raise UserError(
                f"the global batch of {self.global_batch_size} samples has not one for each of {self.world_size} "
                "workers; use fewer workers or a larger batch"
            )
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)

    @property
    def share(self) -> slice:
        """This rank's places in the global batch."""
        return share(self.global_batch_size, self.rank, self.world_size)

    def indices(self, step: int, num_samples: int) -> NDArray[np.int64]:
        """This rank's rows int64 [n] at a step."""
        return batch_indices(self.seed, step, self.global_batch_size, num_samples)[self.share]

    def mirror(self, step: int) -> NDArray[np.bool_]:
        """Which of this rank's samples are mirrored at a step: bool [n]."""
        return mirror_draws(self.seed, step, self.global_batch_size, self.mirror_prob)[self.share]


class Buffers:
    """Tensors float32 [n, 2, C, h, h] to gather into, used again once nobody holds them.

    For a GPU they are page-locked, and torch itself keeps them for use again. On the CPU fresh memory of this size is
    new pages every time, which the kernel clears: more work than the gather itself.
    """

    def __init__(self, plan: BatchPlan, latent_shape: tuple[int, int, int]) -> None:
        self.device, self.shape = plan.device, (plan.share.stop - plan.share.start, 2, *latent_shape)
        self._arrays: list[NDArray[np.float32]] = []

    def empty(self) -> Tensor:
        """An uninitialised tensor that nothing else refers to."""
        if self.device.type == "cuda":
            with on_device(self.device):
                return torch.empty(self.shape, pin_memory=True)
        # Every tensor and view of an array counts as one reference to it, beside the list, the loop and the question.
        free = next((array for array in self._arrays if sys.getrefcount(array) == 3), None)
        if free is None:
            free = np.empty(self.shape, np.float32)
            self._arrays.append(free)
        return torch.from_numpy(free)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where to make page-locked memory for a device: a thread starts out on GPU 0, and would open a context there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def require_finite(batch: LatentBatch) -> None:
    """Raise UserError, naming them, where latents of a batch are not finite: they would spoil the whole model."""
    # One cheap pass: the sum of finite latents of a batch is finite. Of numpy, for torch's would wake threads.
    if np.isfinite(batch.posterior.numpy().sum()):
        return
    bad = np.flatnonzero(~torch.isfinite(batch.posterior).flatten(1).all(1).numpy())
    if not len(bad):
        return
    raise UserError(
        f"{len(bad)} latents of step {batch.step} are not finite ({sample_names(batch, bad)}); encode the images again"
    )


def sample_names(batch: LatentBatch, places: NDArray[np.int64]) -> str:
    """The samples at some places of a batch, by their keys or else their rows in the data set."""
    ids = [batch.keys[i] for i in places] if batch.keys else [str(row) for row in batch.indices[places]]
    return f"{'keys' if batch.keys else 'rows'} {listing(ids, ', ')}"


def latent_batches(dataset: LatentDataset, plan: BatchPlan, start_step: int = 0) -> Generator[LatentBatch, None, None]:
    """Batches of steps start_step, start_step + 1, ... without end: a pure function of the plan and the step.

    Epochs are laid end to end: no row is dropped, and each epoch takes each row once.
    """
    step, buffers = start_step, Buffers(plan, dataset.info.latent_shape)
    while True:
        indices, mirror = plan.indices(step, len(dataset)), plan.mirror(step)
        posterior = buffers.empty()
        _, labels = dataset.gather(indices, mirror, posterior.numpy())
        yield LatentBatch(step, indices, mirror, posterior, torch.from_numpy(labels))
        step += 1
