"""Statistics of latents by channel, as the manifest states them. Legend: C latent channels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edt_core.data.latents.shard import LatentShard


def channel_sums(latents: LatentShard) -> dict[str, NDArray[np.float64]]:
    """Sum and sum of squares by channel of the latents that training draws, the posterior's variance included."""
    channels = latents.info.latent_shape[0]
    total, squares = np.zeros(channels), np.zeros(channels)
    for side, _ in latents.chunks:
        values = latents.info.numbers.widened(side)
        posterior = values.reshape(-1, 2, *latents.info.latent_shape).astype(np.float64)
        mean, std = posterior[:, 0], posterior[:, 1]
        total += mean.sum((0, 2, 3))
        squares += (mean**2 + std**2).sum((0, 2, 3))
    return {"total": total, "squares": squares}


def deviation(mean: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviations [C] from means [C] of values and of their squares; 0 for a variance below 0 by rounding."""
    variance = np.maximum(square - mean**2, 0.0)
    return np.sqrt(variance)


def store_error(
    by_shard: Sequence[NDArray[np.float32]], deviations: NDArray[np.float64]
) -> dict[str, dict[str, float]]:
    """The largest error of all stored means ("mean"), and of all stored standard deviations ("std").

    `max` is the error itself, `in_std` in standard deviations of the latents' channel, where it is not constant.
    by_shard: largest errors [2, C] of each shard. deviations: [C].
    """
    largest = np.max(by_shard, axis=0).astype(np.float64)
    relative = np.divide(largest, deviations, out=np.zeros_like(largest), where=deviations > 0)
    return {
        name: {"max": float(largest[place].max()), "in_std": float(relative[place].max())}
        for place, name in enumerate(("mean", "std"))
    }
