"""Improved precision and recall: do samples lie within the other set's manifold?

The manifold of a set is the union of balls around its points, each as wide as its point's k-th nearest
neighbour is far (Kynkäänniemi et al. 2019, arXiv 1904.06991).

Shapes: N, M samples, D dimensions. Distances are float64, in blocks of block_size².
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from edt_core.metrics.features import checked_pair


class PrecisionRecall(NamedTuple):
    """precision: share of generated samples within the reference's manifold; recall: the reverse; 0..1."""

    precision: float
    recall: float


def precision_recall(
    generated: ArrayLike,
    reference: ArrayLike,
    *,
    k: int = 3,
    block_size: int = 2048,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """Improved precision and recall (eq. 2 of the paper) of features [N, D] and [M, D].

    k: which nearest neighbour, the point itself not counted, sets a ball's radius. `device` must support
    float64. Raises UserError for features that do not fit, and for k samples or fewer in a set.
    """
    pair = checked_pair(generated, reference, min_samples=k + 1)
    x, y = (torch.from_numpy(np.ascontiguousarray(features)).to(device) for features in pair)
    return PrecisionRecall(
        precision=_share_inside(x, y, squared_radii(y, k, block_size), block_size),
        recall=_share_inside(y, x, squared_radii(x, k, block_size), block_size),
    )


def squared_radii(points: Tensor, k: int, block_size: int) -> Tensor:
    """Squared distance of each point [N, D] to its k-th nearest other point, [N]."""
    radii = []
    for rows in points.split(block_size):
        nearest = torch.full((len(rows), k + 1), torch.inf, dtype=torch.float64, device=points.device)
        for columns in points.split(block_size):
            candidates = torch.cat([nearest, squared_distances(rows, columns)], dim=1)
            nearest = candidates.topk(k + 1, dim=1, largest=False).values
        radii.append(nearest.amax(dim=1))  # k + 1, because each point is its own nearest
    return torch.cat(radii)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs of [n, D] and [m, D], float64 [n, m].

    A distance that rounding cannot tell from 0 is 0, so that equal points are equal.
    """
    x, y = x.double(), y.double()
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = norms - 2.0 * (x @ y.T)
    noise_level = x.shape[1] * torch.finfo(torch.float64).eps * norms
    return distances.masked_fill_(distances <= noise_level, 0.0)


def _share_inside(queries: Tensor, centres: Tensor, radii: Tensor, block_size: int) -> float:
    """Share of queries [N, D] within a ball of squared radius radii [M] around any of centres [M, D]."""
    count = 0
    for rows in queries.split(block_size):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=queries.device)
        for columns, reach in zip(centres.split(block_size), radii.split(block_size), strict=True):
            inside |= (squared_distances(rows, columns) <= reach).any(dim=1)
        count += int(inside.sum())
    return count / len(queries)
