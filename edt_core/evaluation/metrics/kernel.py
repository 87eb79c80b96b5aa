"""Kernel distance (KID): an unbiased squared maximum mean discrepancy with a cubic polynomial kernel.

Shapes: N, M samples, D dimensions. Blocks of rows are converted to float64 when they are used.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from edt_core.evaluation.metrics.features import checked_pair

Kernel = Callable[[Tensor, Tensor], Tensor]  # [n, D] and [m, D] -> float64 [n, m]


def kernel_distance(
    generated: ArrayLike,
    reference: ArrayLike,
    *,
    block_size: int = 2048,
    device: torch.device | str = "cpu",
) -> float:
    """Unbiased MMD^2 over all pairs for k(x, y) = (x.y / D + 1)^3 (Bińkowski et al. 2018, arXiv 1801.01401).

    generated: [N, D], reference: [M, D]. May be below 0 if the sets are alike. All pairs are used, not random
    subsets, so the value is deterministic. `device` must support float64; it stores the features and one kernel
    of block_size². Raises UserError for invalid features, and for fewer than two samples in a set.
    """
    first, second = (torch.from_numpy(np.ascontiguousarray(f)) for f in checked_pair(generated, reference))
    x, y = first.to(device), second.to(device)
    within_x = sum_within(cubic_kernel, x, block_size, _of_distinct) / (len(x) * (len(x) - 1))
    within_y = sum_within(cubic_kernel, y, block_size, _of_distinct) / (len(y) * (len(y) - 1))
    return float(within_x + within_y - 2.0 * sum_between(cubic_kernel, x, y, block_size) / (len(x) * len(y)))


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 for all pairs of [n, D] and [m, D], float64 [n, m]."""
    return (x.double() @ y.double().T / x.shape[1] + 1.0).pow(3)


def _of_distinct(diagonal_block: Tensor) -> Tensor:
    """The sum of a block without the pairs of a sample with itself."""
    return diagonal_block.sum() - diagonal_block.trace()


def sum_between(kernel: Kernel, x: Tensor, y: Tensor, block_size: int) -> Tensor:
    """Sum of k(x_i, y_j) over all pairs of [N, D] and [M, D], block by block."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in x.split(block_size):
        for columns in y.split(block_size):
            total += kernel(rows, columns).sum()
    return total


def sum_within(
    kernel: Kernel, x: Tensor, block_size: int, on_diagonal: Callable[[Tensor], Tensor] = torch.sum
) -> Tensor:
    """Sum of k(x_i, x_j) over the pairs of [N, D]; blocks above the diagonal count twice, for those below it.

    `on_diagonal` sums a block of the diagonal, with or without the pairs of a sample with itself.
    """
    blocks = x.split(block_size)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for i, rows in enumerate(blocks):
        total += on_diagonal(kernel(rows, rows))
        for columns in blocks[i + 1 :]:
            total += 2.0 * kernel(rows, columns).sum()
    return total
