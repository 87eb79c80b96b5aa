"""The layers of EDT around its attention: embeddings, and the modules that change the number of tokens.

Legend: N = batch, n = grid side of the input, T = n² tokens, C = channels, D = width, K = width of the
conditioning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edt_core.models.kernels import TokenLinear
from edt_core.models.positions import sincos_position_embedding, timestep_embedding

_FREQUENCY_DIM = 256  # width of the sinusoidal timestep embedding, as in DiT


def merge_tokens(x: Tensor, grid: int) -> Tensor:
    """Merge every 2x2 cell of tokens into one: [N, T, C] -> [N, T/4, 4C]. Counterpart of `split_tokens`.

    The four vectors of a cell are in the order (row, column) = (0,0), (1,0), (0,1), (1,1).
    """
    half = grid // 2
    cells = x.reshape(-1, half, 2, half, 2, x.shape[-1])  # N, row, row in cell, column, column in cell, C
    return cells.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)


def split_tokens(x: Tensor, grid: int) -> Tensor:
    """Split every token into a 2x2 cell of tokens: [N, T, 4C] -> [N, 4T, C]. Counterpart of `merge_tokens`.

    The four vectors are in the order (row, column) = (0,0), (0,1), (1,0), (1,1), so splitting merged tokens
    transposes every cell; the linear layers around the two can learn either order.
    """
    width = x.shape[-1] // 4
    cells = x.reshape(-1, grid, grid, 2, 2, width)  # N, row, column, row in cell, column in cell, C
    return cells.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Per-sample affine map of tokens: [N, T, D] with [N, D] shift and scale (adaLN, arXiv 2212.09748)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def adaln_projection(cond_dim: int, out_dim: int) -> nn.Sequential:
    """Projection of the conditioning to the shifts, scales and gates of one module: [N, K] -> [N, out_dim]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, out_dim))


class AdaptiveLayerNorm(nn.LayerNorm):
    """Layer norm whose shift and scale are inputs."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise and modulate: x [N, T, D], shift and scale [N, D] -> [N, T, D]."""
        return modulate(super().forward(x), shift, scale)


class PatchEmbedding(nn.Module):
    """Latents to tokens, one per patch."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed: [N, C, h, h] -> [N, T, D]."""
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class TimestepEmbedding(nn.Module):
    """Timesteps, whole or fractional, to vectors."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCY_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Embed: [N] -> [N, K]."""
        dtype = self.mlp.get_parameter("0.weight").dtype
        out: Tensor = self.mlp(timestep_embedding(t, _FREQUENCY_DIM).to(dtype))
        return out


class LabelEmbedding(nn.Module):
    """Labels 0..num_classes to vectors; the last one is the null class of guidance."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        """Look up: [N] -> [N, K]."""
        out: Tensor = self.embedding_table(y)
        return out


class DownSample(nn.Module):
    """Merge 2x2 tokens into one of width D'.

    Adaptive layer norm before the projection (token information enhancement, TIE), a position embedding after it
    (positional encoding supplement, PES). A masked token's vector is zeroed between norm and projection, after the
    blocks of the stage have mixed all tokens (token relation-enhanced masking). Source: arXiv 2410.23788.

    Without `enhanced` or `supplemented` the module lacks that part and its weights (table 4 of the paper).
    """

    pos_embed: Tensor | None
    norm: AdaptiveLayerNorm | None

    def __init__(
        self, dim: int, out_dim: int, grid: int, cond_dim: int, *, enhanced: bool = True, supplemented: bool = True
    ) -> None:
        super().__init__()
        self.grid = grid
        self.norm = AdaptiveLayerNorm(4 * dim) if enhanced else None
        if enhanced:
            self.adaLN_modulation = adaln_projection(cond_dim, 8 * dim)
        self.reduction = TokenLinear(4 * dim, out_dim, bias=False)
        self.register_buffer("pos_embed", sincos_position_embedding(out_dim, grid // 2) if supplemented else None)

    def forward(self, x: Tensor, c: Tensor, keep: Tensor | None = None) -> Tensor:
        """Merge: x [N, T, D], c [N, K], keep [N, T] bool (False: the token is masked) -> [N, T/4, D']."""
        merged = merge_tokens(x, self.grid)
        if self.norm is not None:
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
            merged = self.norm(merged, shift, scale)
        if keep is not None:
            cells = merged.unflatten(-1, (4, -1)) * merge_tokens(keep.unsqueeze(-1), self.grid).unsqueeze(-1)
            merged = cells.flatten(-2)
        out: Tensor = self.reduction(merged)
        return out if self.pos_embed is None else out + self.pos_embed


class UpSample(nn.Module):
    """Split each token into 2x2 of width D'."""

    def __init__(self, dim: int, out_dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.expand = TokenLinear(dim, 4 * out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Split: [N, T, D] -> [N, 4T, D']."""
        return split_tokens(self.expand(x), self.grid)


class SkipConnection(nn.Module):
    """Join a long skip: concatenate, normalise adaptively, project, and add a position embedding."""

    pos_embed: Tensor

    def __init__(self, dim: int, grid: int, cond_dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm_final = AdaptiveLayerNorm(2 * dim)
        self.adaLN_modulation = adaln_projection(cond_dim, 4 * dim)
        self.cat = TokenLinear(2 * dim, dim)
        self.register_buffer("pos_embed", sincos_position_embedding(dim, grid))

    def forward(self, x: Tensor, skip: Tensor, c: Tensor) -> Tensor:
        """Join: x and skip [N, T, D], c [N, K] -> [N, T, D]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.cat(self.norm_final(torch.cat([x, skip], dim=-1), shift, scale)) + self.pos_embed
        return out


class FinalLayer(nn.Module):
    """Tokens to patches of the output (DiT, arXiv 2212.09748)."""

    def __init__(self, dim: int, out_dim: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final = AdaptiveLayerNorm(dim)
        self.linear = TokenLinear(dim, out_dim)
        self.adaLN_modulation = adaln_projection(cond_dim, 2 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Project: x [N, T, D], c [N, K] -> [N, T, patch² · C]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(self.norm_final(x, shift, scale))
        return out


class FeedForward(nn.Module):
    """Two linear layers around a tanh GELU, token by token."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(dim, hidden_dim)
        self.fc2 = TokenLinear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform: [N, T, D] -> [N, T, D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def patches_to_image(x: Tensor, grid: int, patch_size: int) -> Tensor:
    """[N, T, patch² · C] -> [N, C, h, h], h = n · patch; a token is its patch row by row, channels last."""
    patches = x.reshape(x.shape[0], grid, grid, patch_size, patch_size, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def image_to_patches(x: Tensor, grid: int, patch_size: int) -> Tensor:
    """The inverse of `patches_to_image`: [N, C, h, h] -> [N, T, patch² · C]."""
    patches = x.unflatten(2, (grid, patch_size)).unflatten(4, (grid, patch_size))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
