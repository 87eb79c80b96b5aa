"""Token positions: sine-cosine embeddings, relative offsets, and the attention modulation matrix.

Legend: n = grid side, T = n² tokens in row-major order, D = width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edt_core.models.config import AmmKernel

_MAX_PERIOD = 10_000.0
PAPER_ROWS = 4  # the square of two rows
_COS_GAIN = 1.3  # height of the "cos" kernel, the authors' choice at 512 pixels


def _sincos(positions: Tensor, frequencies: Tensor) -> Tensor:
    """[P], [F] -> [P, 2F]: sines, then cosines."""
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_position_embedding(dim: int, grid: int) -> Tensor:
    """Fixed position embedding, [1, T, D] float32: D/2 channels for the column, then D/2 for the row.

    Pair i of sine and cosine has frequency 10000^(-4i/D), as in MAE (arXiv 2111.06377).
    """
    half = dim // 4
    frequencies = _MAX_PERIOD ** -(torch.arange(half, dtype=torch.float64) / half)
    axis = _sincos(torch.arange(grid, dtype=torch.float64), frequencies)  # [n, D/2]
    columns = axis[None, :, :].expand(grid, grid, -1)
    rows = axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, dim).float()


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [N] -> [N, dim], float32: cosines, then sines, as in DiT (arXiv 2212.09748)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(_MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def relative_offsets(grid: int) -> Tensor:
    """Signed distances between positions along one axis, shifted to start at 0: [n, n] int64 in 0..2n-2.

    The row of a relative position bias table with (2n-1)² rows is `row offset * (2n-1) + column offset`
    (Swin, arXiv 2103.14030).
    """
    positions = torch.arange(grid)
    return positions[:, None] - positions[None, :] + grid - 1


def amm_matrix(
    grid: int, kernel: AmmKernel = "exp_cos", radius: float | None = None, radius_rows: int | None = None
) -> Tensor:
    """Attention modulation matrix [T, T], float32: a factor for each score, by the distance d of its two tokens.

    The factor is exp(cos(f·d))/2 ("exp_cos") or 1.3·cos(f·d) ("cos"), where the grid's diagonal is a quarter
    of the cosine's period. Beyond `radius` tokens it is 0; if it is None, beyond sqrt((n-1)² + k) tokens, where k is
    `radius_rows` or the paper's 4: the distance from the first token to the last one two rows below it.
    Source: arXiv 2410.23788, Attention Modulation Matrix, and table 10 for other k.
    """
    positions = torch.arange(grid)
    row, column = positions.repeat_interleave(grid), positions.repeat(grid)
    squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    distance = squared.double().sqrt()
    diagonal = (grid - 1) * math.sqrt(2.0)
    # The diagonal is a quarter of the period only up to rounding: its cosine may be -2e-16.
    cosine = torch.cos(distance * (math.pi / 2 / max(diagonal, 1.0))).clamp(min=0.0)
    factor = cosine.exp() / 2 if kernel == "exp_cos" else _COS_GAIN * cosine
    # The paper's radius is compared in integers, which is exact.
    rows = PAPER_ROWS if radius_rows is None else radius_rows
    within = squared <= (grid - 1) ** 2 + rows if radius is None else distance <= radius
    return torch.where(within, factor, 0.0).float()
