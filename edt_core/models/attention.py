"""Self-attention with a learned relative position bias, EDT's attention modulation, and the block around.

Legend: N = batch, n = grid side, T = n² tokens, D = width, H = heads, K = width of the conditioning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edt_core.models.config import AmmKernel
from edt_core.models.layers import AdaptiveLayerNorm, FeedForward, adaln_projection
from edt_core.models.positions import amm_matrix, relative_offsets


class RelativePositionBias(nn.Module):
    """A learned bias for every head and pair of tokens, the same for pairs with the same offset."""

    offsets: Tensor

    def __init__(self, grid: int, num_heads: int) -> None:
        super().__init__()
        self.span = 2 * grid - 1  # offsets along one axis
        self.relative_position_bias_table = nn.Parameter(torch.empty(self.span**2, num_heads))
        self.register_buffer("offsets", relative_offsets(grid), persistent=False)  # [n, n]

    def forward(self) -> Tensor:
        """The bias of all pairs, [H, T, T]."""
        table = self.relative_position_bias_table.t().reshape(-1, self.span, self.span)
        row, column = self.offsets[:, None, :, None], self.offsets[None, :, None, :]
        return table[:, row, column].flatten(3, 4).flatten(1, 2).contiguous()  # from [H, n, n, n, n]


class Attention(nn.Module):
    """Multi-head self-attention among all tokens of a grid.

    With a modulation matrix set, and in evaluation mode only, the soft-maxed scores are multiplied by it and
    not normalised again (Attention Modulation Matrix, arXiv 2410.23788).
    """

    amm: Tensor | None

    def __init__(self, dim: int, num_heads: int, grid: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.grid = grid
        self.rel_pos_bias = RelativePositionBias(grid, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("amm", None, persistent=False)  # [T, T], or None where AMM does not act

    def set_amm(self, kernel: AmmKernel | None) -> None:
        """Modulate with `kernel` from now on; None ends it."""
        device = self.rel_pos_bias.relative_position_bias_table.device
        self.amm = None if kernel is None else amm_matrix(self.grid, kernel).to(device)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [N, T, D] -> [N, T, D]."""
        heads: Tensor = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)  # N, H, T, D/H each
        bias = self.rel_pos_bias().to(q.dtype)
        if self.amm is None or self.training:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
        else:
            mixed = modulated_attention(q, k, v, bias, self.amm)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


def modulated_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, amm: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D/H) + bias) · amm, times v: [N, H, T, D/H] each, bias [H, T, T], amm [T, T]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    weights = scores.softmax(dim=-1, dtype=torch.float32) * amm
    mixed: Tensor = weights.to(v.dtype) @ v
    return mixed


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT, arXiv 2212.09748)."""

    def __init__(self, dim: int, num_heads: int, grid: int, cond_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = AdaptiveLayerNorm(dim)
        self.attn = Attention(dim, num_heads, grid)
        self.norm2 = AdaptiveLayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = adaln_projection(cond_dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Mix tokens x [N, T, D] under the conditioning c [N, K] -> [N, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(self.norm1(x, shift1, scale1))
        out: Tensor = x + gate2.unsqueeze(1) * self.mlp(self.norm2(x, shift2, scale2))
        return out
