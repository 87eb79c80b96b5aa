"""Kernel distance (KID): an unbiased squared maximum mean discrepancy with a cubic polynomial kernel.

Shapes: N, M samples, D dimensions. Blocks of rows are widened to float64 as they are used.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from edt_core.evaluation.metrics.features import checked_pair


def kernel_distance(
    generated: ArrayLike,
    reference: ArrayLike,
    *,
    block_size: int = 2048,
    device: torch.device | str = "cpu",
) -> float:
    """Unbiased MMD^2 over all pairs for k(x, y) = (x.y / D + 1)^3 (Bińkowski et al. 2018, arXiv 1801.01401).

    generated: [N, D], reference: [M, D]. May be below 0 where the sets are alike. All pairs are used, not
    subsets, so there is no random part. `device` must support float64; it holds the features and one kernel
    of block_size². Raises UserError for features that do not fit, and for fewer than two samples in a set.
    """
    first, second = (torch.from_numpy(np.ascontiguousarray(f)) for f in checked_pair(generated, reference))
    x, y = first.to(device), second.to(device)
    within_x = _sum_of_distinct_pairs(x, block_size) / (len(x) * (len(x) - 1))
    within_y = _sum_of_distinct_pairs(y, block_size) / (len(y) * (len(y) - 1))
    between = sum(cubic_kernel(a.double(), b.double()).sum() for a in x.split(block_size) for b in y.split(block_size))
    return float(within_x + within_y - 2.0 * between / (len(x) * len(y)))


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 for all pairs of [n, D] and [m, D], [n, m]."""
    return (x @ y.T / x.shape[1] + 1.0).pow(3)


def _sum_of_distinct_pairs(x: Tensor, block_size: int) -> Tensor:
    """Sum of k(x_i, x_j) over all i != j; blocks above the diagonal count for those below it."""
    blocks = x.split(block_size)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for i, rows in enumerate(blocks):
        wide = rows.double()
        diagonal_block = cubic_kernel(wide, wide)
        total += diagonal_block.sum() - diagonal_block.trace()
        for columns in blocks[i + 1 :]:
            total += 2.0 * cubic_kernel(wide, columns.double()).sum()
    return total
