"""CMMD: a squared maximum mean discrepancy of CLIP's image embeddings with a Gaussian kernel (arXiv 2401.09603).

Shapes: N, M samples, D dimensions. Blocks of rows are converted to float64 when they are used.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from edt_core.evaluation.metrics.features import checked_pair
from edt_core.evaluation.metrics.kernel import sum_between, sum_within
from edt_core.evaluation.metrics.manifold import squared_distances

SIGMA = 10.0  # width of the kernel, for embeddings of length 1
SCALE = 1000.0  # for values of a readable size


def cmmd(
    generated: ArrayLike,
    reference: ArrayLike,
    *,
    block_size: int = 2048,
    device: torch.device | str = "cpu",
) -> float:
    """1000 MMD² over all pairs for k(x, y) = exp(-|x - y|² / (2 · 10²)) (Jayasumana et al. 2024).

    generated: [N, D], reference: [M, D], each row of length 1. The estimator is that of the authors' code: each mean is
    over all pairs, including those of a sample with itself, so the value is at least 0 and slightly too high: by
    1000 E[1 - k] (1/N + 1/M) if both sets have the same distribution. `device` must support float64; it stores the
    features and a few kernels of block_size². Raises UserError for invalid features, and for fewer than two in a set.
    """
    pair = checked_pair(generated, reference)
    x, y = (torch.from_numpy(np.ascontiguousarray(features)).to(device) for features in pair)
    between = sum_between(_fall, x, y, block_size)
    within = sum(sum_within(_fall, side, block_size) / len(side) ** 2 for side in (x, y))
    # The kernels are shifted by -1, which cancels out here: 1 + 1 - 2 = 0.
    return max(float(SCALE * (within - 2.0 * between / (len(x) * len(y)))), 0.0)


def _fall(x: Tensor, y: Tensor) -> Tensor:
    """k - 1 for all pairs of [n, D] and [m, D], float64 [n, m]: k is so close to 1 that k itself would lose digits."""
    return torch.expm1(squared_distances(x, y) / (-2.0 * SIGMA**2))
