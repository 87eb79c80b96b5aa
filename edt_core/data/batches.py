"""Global batches of a training's latents, by whichever reader has them."""

from collections.abc import Generator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edt_core.data.latents import LatentDataset
from edt_core.data.loader import BatchPlan, LatentBatch, latent_batches
from edt_core.data.streaming import ShardStream, TarStream, stream_shards, stream_tars

Latents: TypeAlias = LatentDataset | ShardStream | TarStream


def without(latents: Latents, rows: NDArray[np.int64]) -> Latents:
    """The latents without these rows of the shards, int64 in order."""
    if isinstance(latents, LatentDataset):
        return latents.part(np.delete(np.arange(len(latents)), rows))
    assert isinstance(latents, ShardStream), "tars have no rows"
    return latents.without(rows)


def batches_of(latents: Latents, plan: BatchPlan, start_step: int = 0) -> Generator[LatentBatch, None, None]:
    """Endless batches of steps start_step, start_step + 1, ...; each reader describes their order."""
    if isinstance(latents, LatentDataset):
        return latent_batches(latents, plan, start_step)
    if isinstance(latents, ShardStream):
        return stream_shards(latents, plan, start_step)
    return stream_tars(latents, plan, start_step)
