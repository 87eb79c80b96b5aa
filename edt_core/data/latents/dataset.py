"""All latent shards of an artifact as one table.

Legend: n requested rows, C latent channels, h latent height and width.
"""

from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.data.latents.shard import LatentShard
from edt_core.data.scale import LatentScale
from edt_core.errors import UserError
from edt_core.store.layout import POSTERIOR_COLUMNS


class LatentDataset:
    """All latent shards of an artifact as one indexable table, in order of shard and row.

    Raises UserError for shards of different encodings, for a repeated shard, and for shards out of order: the order of
    training data is defined by row number and would change silently.
    """

    def __init__(self, files: Sequence[Path | LatentShard]) -> None:
        if not files:
            raise UserError("no latent shards given; encode the images first")
        shards = [file if isinstance(file, LatentShard) else LatentShard(file) for file in files]
        paths = [shard.path for shard in shards]
        self.info = shards[0].info
        for path, shard in zip(paths, shards, strict=True):
            if shard.info.encoding != self.info.encoding:
                raise UserError(
                    f"{path} was encoded as {shard.info.encoding}, {paths[0]} as {self.info.encoding}; encode the "
                    "images again"
                )
        _check_order(paths, [shard.info.source_shard for shard in shards])
        self.labels: NDArray[np.int64] = np.concatenate([shard.labels for shard in shards])
        chunks = [chunk for shard in shards for chunk in shard.chunks]
        # Of chunk k the images' side at 2k, that of the mirror images at 2k + 1.
        self._sides = [side for chunk in chunks for side in chunk]
        self._starts = np.cumsum([0, *(len(chunk[0]) for chunk in chunks)])  # first row of each chunk, then all rows
        self._rows: NDArray[np.int64] | None = None  # the rows of a part
        if not len(self):
            raise UserError(f"the {len(paths)} latent shards contain no rows; encode the images again")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def scale(self) -> LatentScale:
        return self.info.scale

    def part(self, rows: NDArray[np.int64]) -> "LatentDataset":
        """These rows, int64 [n], as a data set whose row i is row `rows[i]` of this one. Copies no latents."""
        part = copy(self)
        part.labels, part._rows = self.labels[rows], self.origin(rows)
        return part

    def origin(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows, in the shards, of some rows of this data set; they differ only for a part."""
        return indices if self._rows is None else self._rows[indices]

    def gather(
        self, indices: NDArray[np.int64], mirror: NDArray[np.bool_], out: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Posterior [n, 2, C, h, h] (mean, std) and labels int64 [n] of rows; mirrored where `mirror` is true.

        The posterior has the numbers of the shards, see `info.numbers`: float32, or half precision as it is stored. If
        `out` (C-contiguous, of that shape and dtype) is given, it is written to it. Raises IndexError for rows out of
        range.
        """
        shape, dtype = (len(indices), 2, *self.info.latent_shape), self.info.numbers.array
        posterior = np.empty(shape, dtype) if out is None else out
        assert posterior.shape == shape, (posterior.shape, shape)
        assert posterior.dtype == dtype, (posterior.dtype, dtype)
        assert posterior.flags.c_contiguous
        if not len(indices):
            return posterior, np.empty(0, np.int64)
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)}")
        places_in_shards = self.origin(indices)
        chunks = np.searchsorted(self._starts, places_in_shards, side="right") - 1
        rows = places_in_shards - self._starts[chunks]
        # One call copies a list of row views, without a pass per shard: at most a sixth slower than from memory.
        places = zip((len(POSTERIOR_COLUMNS) * chunks + mirror).tolist(), rows.tolist(), strict=True)
        np.concatenate([self._sides[side][row] for side, row in places], out=posterior.reshape(-1))
        return posterior, self.labels[indices]


def _check_order(paths: Sequence[Path], sources: list[str]) -> None:
    for index, (previous, source) in enumerate(pairwise(sources), start=1):
        if source in sources[:index]:
            twin = paths[sources.index(source)]
            raise UserError(
                f"{twin} and {paths[index]} both come from {source!r}: a repeated shard; encode the images again"
            )
        if source < previous:
            raise UserError(
                f"{paths[index]} comes from {source!r}, but {paths[index - 1]} before it from {previous!r}: the shards "
                "are out of order; give them in the order of their image shards, or encode the images again"
            )
