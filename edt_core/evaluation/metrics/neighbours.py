"""Nearest real images of generated ones in a feature space, to check whether a model copies training images.

Shapes: N queries, M candidates, D dimensions, k neighbours of a query.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from edt_core.evaluation.metrics.features import check_same_dimensions, checked_features
from edt_core.evaluation.metrics.manifold import squared_distances


class Neighbours(NamedTuple):
    """rows: int64 [N, k] of the candidates, nearest first. distances: Euclidean, float64 [N, k]."""

    rows: NDArray[np.int64]
    distances: NDArray[np.float64]


def nearest_neighbours(
    queries: ArrayLike, candidates: Iterable[ArrayLike], k: int, own_rows: ArrayLike | None = None
) -> Neighbours:
    """The k nearest candidates of each query [N, D].

    candidates: features [m, D] block by block, their rows numbered across blocks; one block is in memory at a time.
    own_rows: int [N], the row of each query if the queries are candidates themselves; a query is not its own neighbour.
    Raises UserError for features that are not finite or do not match; ValueError for fewer than k candidates, not
    counting a query itself.
    """
    points = torch.from_numpy(np.ascontiguousarray(checked_features(queries, "generated", 1)))
    own = None if own_rows is None else torch.as_tensor(np.asarray(own_rows), dtype=torch.int64)
    nearest = torch.full((len(points), k), torch.inf, dtype=torch.float64)
    rows = torch.full((len(points), k), -1, dtype=torch.int64)
    first = 0
    for block in candidates:
        features = torch.from_numpy(np.ascontiguousarray(checked_features(block, "reference", 1)))
        check_same_dimensions(points.shape[1], features.shape[1])
        distances = squared_distances(points, features)
        numbers = torch.arange(first, first + len(features))
        if own is not None:
            distances.masked_fill_(numbers == own[:, None], torch.inf)
        both = torch.cat([nearest, distances], dim=1)
        nearest, columns = both.topk(k, dim=1, largest=False)
        rows = torch.cat([rows, numbers.expand(len(points), -1)], dim=1).gather(1, columns)
        first += len(features)
    if first < k + (own is not None):
        raise ValueError(f"{k} neighbours are requested, but there are {first} candidates")
    order = nearest.argsort(dim=1, stable=True)
    return Neighbours(rows.gather(1, order).numpy(), nearest.gather(1, order).sqrt().numpy())
