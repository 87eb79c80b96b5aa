"""Improved precision and recall: the shares of samples within the other set's manifold.

The manifold of a set is the union of balls around its points; the radius of a ball is the distance to the point's
k-th nearest neighbour (Kynkäänniemi et al. 2019, arXiv 1904.06991).

Shapes: N, M samples, D dimensions. Distances are float64, in blocks of block_size², each computed once.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from edt_core.evaluation.metrics.features import checked_pair


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

    k: the nearest neighbour, not counting the point itself, that sets a ball's radius. `device` must support
    float64; it stores the features and a few blocks. Raises UserError for invalid features, and for k samples or
    fewer in a set.
    """
    pair = checked_pair(generated, reference, min_samples=k + 1)
    x, y = (torch.from_numpy(np.ascontiguousarray(features)).to(device) for features in pair)
    reach_x, reach_y = (squared_radii(points, k, block_size).split(block_size) for points in (x, y))
    x_inside = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    y_inside = torch.zeros(len(y), dtype=torch.bool, device=x.device)
    for i, rows in enumerate(x.split(block_size)):
        row_inside = x_inside.split(block_size)[i]  # a view
        for j, columns in enumerate(y.split(block_size)):
            distances = squared_distances(rows, columns)
            row_inside |= (distances <= reach_y[j]).any(dim=1)
            y_inside.split(block_size)[j].logical_or_((distances <= reach_x[i][:, None]).any(dim=0))
    return PrecisionRecall(precision=_share(x_inside), recall=_share(y_inside))


def squared_radii(points: Tensor, k: int, block_size: int) -> Tensor:
    """Squared distance of each point [N, D] to its k-th nearest other point, [N]; N > k."""
    blocks = points.split(block_size)
    nearest = torch.full((len(points), k), torch.inf, dtype=torch.float64, device=points.device)
    views = nearest.split(block_size)
    for i, rows in enumerate(blocks):
        for j in range(i, len(blocks)):  # distances are symmetric: a block also serves the rows of its transpose
            distances = squared_distances(rows, blocks[j])
            if i == j:
                distances.fill_diagonal_(torch.inf)
            else:
                _keep_nearest(views[j], distances.T.contiguous())
            _keep_nearest(views[i], distances)
    return nearest.amax(dim=1)


def _keep_nearest(nearest: Tensor, distances: Tensor) -> None:
    """Replace nearest [n, k] by the k smallest of its own values and of distances [n, m]."""
    least = distances.topk(min(nearest.shape[1], distances.shape[1]), dim=1, largest=False).values
    nearest.copy_(torch.cat([nearest, least], dim=1).topk(nearest.shape[1], dim=1, largest=False).values)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs of [n, D] and [m, D], float64 [n, m].

    A distance that cannot be distinguished from 0 due to rounding is 0, so that equal points have distance 0.
    """
    x, y = x.double(), y.double()
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = torch.addmm(norms, x, y.T, alpha=-2.0)
    noise_level = x.shape[1] * torch.finfo(torch.float64).eps * norms
    return distances.masked_fill_(distances <= noise_level, 0.0)


def _share(inside: Tensor) -> float:
    return int(inside.sum()) / len(inside)
