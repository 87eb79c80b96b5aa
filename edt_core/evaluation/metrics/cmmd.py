"""CMMD: a squared maximum mean discrepancy of CLIP's image embeddings with a Gaussian kernel (arXiv 2401.09603).

Shapes: N, M samples, D dimensions. Blocks of rows are widened to float64 as they are used.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from edt_core.evaluation.metrics.features import checked_pair
from edt_core.evaluation.metrics.kernel import sum_between, sum_within
from edt_core.evaluation.metrics.manifold import squared_distances

SIGMA = 10.0  # width of the kernel, for embeddings of length 1
SCALE = 1000.0  # makes the values of a size that people read


def cmmd(
    generated: ArrayLike,
    reference: ArrayLike,
    *,
    block_size: int = 2048,
    device: torch.device | str = "cpu",
) -> float:
    """1000 MMD² over all pairs for k(x, y) = exp(-|x - y|² / (2 · 10²)) (Jayasumana et al. 2024).

    generated: [N, D], reference: [M, D], each row of length 1. The estimator is that of the authors' code: each mean is
    over all pairs, a sample with itself included, so the value is at least 0 and a little too high: where both sets
    come from one distribution, by 1000 E[1 - k] (1/N + 1/M). `device` must support float64; it holds the features and
    a few kernels of block_size². Raises UserError for features that do not fit, and for fewer than two in a set.
    """
    pair = checked_pair(generated, reference)
    x, y = (torch.from_numpy(np.ascontiguousarray(features)).to(device) for features in pair)
    between = sum_between(_fall, x, y, block_size)
    within = sum(sum_within(_fall, side, block_size) / len(side) ** 2 for side in (x, y))
    # Of the ones that were taken off the kernels two come back and two go.
    return max(float(SCALE * (within - 2.0 * between / (len(x) * len(y)))), 0.0)


def _fall(x: Tensor, y: Tensor) -> Tensor:
    """k - 1 for all pairs of [n, D] and [m, D], float64 [n, m]: k is so near 1 that the difference is what counts."""
    return torch.expm1(squared_distances(x, y) / (-2.0 * SIGMA**2))
