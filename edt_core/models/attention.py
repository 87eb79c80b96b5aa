"""Self-attention with a learned relative position bias, EDT's attention modulation, and the transformer block.

Legend: N = batch, n = grid side, T = n² tokens, k = unmasked tokens, D = width, H = heads, K = width of the
conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edt_core.models.config import AmmKernel
from edt_core.models.kernels import project_tokens
from edt_core.models.layers import AdaptiveLayerNorm, FeedForward, adaln_projection
from edt_core.models.positions import amm_matrix, relative_offsets
from edt_core.models.weight_memo import made_once

AttentionForm = Literal["written_out", "sdpa"]
Projections = tuple[Tensor, Tensor | None, Tensor]  # weights of qkv, bias of qkv, weights of proj
_FUSED_FROM = 256  # tokens from which modulated attention on a CPU is faster in the fused kernel
_NEVER = -1e4  # added to a score, its weight is 0 in float32; unlike -inf, a whole tile of it gives no NaN


class RelativePositionBias(nn.Module):
    """A learned bias for every head and pair of tokens, equal for pairs with the same offset."""

    offsets: Tensor

    def __init__(self, grid: int, num_heads: int) -> None:
        super().__init__()
        self.span = 2 * grid - 1  # offsets along one axis
        self.relative_position_bias_table = nn.Parameter(torch.empty(self.span**2, num_heads))
        self.register_buffer("offsets", relative_offsets(grid), persistent=False)  # [n, n]

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """The bias of all pairs [H, T, T], or of the pairs of each row's unmasked tokens: [N, k] -> [N, H, k, k].

        It uses index_select over the last dimension: with its backward pass, 8 times as fast as table[pairs].
        """
        table = self.relative_position_bias_table.t()
        if indices is None:
            pairs = self.offsets[:, None, :, None] * self.span + self.offsets[None, :, None, :]  # [n, n, n, n]
            tokens = len(self.offsets) ** 2
            return table.index_select(1, pairs.flatten()).view(-1, tokens, tokens)
        pairs = self.pairs(indices)
        return table.index_select(1, pairs.flatten()).view(-1, *pairs.shape).transpose(0, 1)

    def pairs(self, tokens: Tensor) -> Tensor:
        """The table's row for each pair of tokens: [..., k] -> [..., k, k], int32, since MDTv2 has many of them."""
        tokens, grid = tokens.int(), len(self.offsets)
        row, column = tokens // grid, tokens % grid
        along_rows = row.unsqueeze(-1) - row.unsqueeze(-2) + grid - 1
        along_columns = column.unsqueeze(-1) - column.unsqueeze(-2) + grid - 1
        return along_rows * self.span + along_columns


class Attention(nn.Module):
    """Multi-head self-attention among the tokens of a grid, with or without a position bias.

    If a modulation matrix is set, in evaluation mode and without masks, the scores after the softmax are multiplied
    by it and not normalised again (Attention Modulation Matrix, arXiv 2410.23788). With `amm_in_training` it acts in
    training and with masks too, by the positions of the tokens that are left. `extra_tokens` come before those of
    the grid and have no position on it; AMM treats them as at distance 0 from every token.
    """

    amm: Tensor | None
    amm_in_training: bool = False
    calls_layers: bool = False  # whether `qkv` and `proj` are called: quantised ones have no weights to pad or convolve
    form: AttentionForm | None = None  # None: by device and need, see `is_written_out`
    shared: dict[torch.dtype, Projections] | None = None  # padded, by dtype, within `shared_projections`

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: int,
        position_bias: RelativePositionBias | None = None,
        *,
        extra_tokens: int = 0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.grid = grid
        self.extra_tokens = extra_tokens
        self.rel_pos_bias = position_bias
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        # [T, T], where T includes the extra tokens; None if AMM is off.
        self.register_buffer("amm", None, persistent=False)

    def set_amm(self, kernel: AmmKernel | None, radius: float | None = None, radius_rows: int | None = None) -> None:
        """Modulate with `kernel`, up to a radius as of `amm_matrix`; kernel None turns AMM off."""
        if kernel is None:
            self.amm = None
            return
        device = next(self.parameters()).device
        with torch.device("cpu"):  # a model may be built with "meta" as its device, which has no values
            amm = amm_matrix(self.grid, kernel, radius, radius_rows)
        if extra := self.extra_tokens:
            amm = F.pad(amm, (extra, 0, extra, 0), value=float(amm[0, 0]))
        # Weights on "meta" get their values later (accelerate loads that way); the values of the matrix would be lost.
        self.amm = amm if device.type == "meta" else amm.to(device)

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Attend: [N, T, D] -> [N, T, D]. `indices`, int64 [N, T], are the tokens' positions if some are masked."""
        if self.calls_layers:
            return self._call_layers(x, indices)
        qkv_weight, qkv_bias, proj_weight = self._projections(x.device)
        heads = project_tokens(x, qkv_weight, qkv_bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # N, H, T, D/H each
        mixed = self._mix(q, k, v, indices)
        return project_tokens(mixed.transpose(1, 2).flatten(2), proj_weight, self.proj.bias)

    def _call_layers(self, x: Tensor, indices: Tensor | None) -> Tensor:
        """`forward` with padded activations instead of padded weights."""
        heads: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        if padding := head_padding(self.head_dim, x.device):
            heads = F.pad(heads, (0, padding))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self._mix(q, k, v, indices)[..., : self.head_dim]
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor | None) -> Tensor:
        """The weighted values v, all [N, H, T, D/H]. The scale is set here, since q's heads may be padded."""
        scale, amm, bias = self.head_dim**-0.5, self._modulation(indices), self._bias(q.dtype, indices)
        chosen = self.form if amm is None and indices is None else None
        if amm is not None and (self.training or indices is not None):
            chosen = "written_out"  # the fused form is for matrices that no gradient passes, the same for all rows
        if chosen == "written_out" or (chosen is None and is_written_out(q, bias, amm)):
            return written_out_attention(q, k, v, bias, scale, amm)
        if amm is None:
            mask = bias if bias is None or bias.ndim == 4 else bias.unsqueeze(0)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        mask = made_once((self, amm, q.dtype), lambda: modulation_mask(amm, bias).to(q.dtype))
        return fused_modulated_attention(q, k, v, mask, scale, amm[0, 0])

    def _modulation(self, indices: Tensor | None) -> Tensor | None:
        """The factors of the scores, [T, T], or [N, 1, k, k] of the tokens at `indices`, [N, k]; None for none."""
        if self.amm is None or not (self.amm_in_training or (indices is None and not self.training)):
            return None
        return self.amm if indices is None else self.amm[indices.unsqueeze(2), indices.unsqueeze(1)].unsqueeze(1)

    def _bias(self, dtype: torch.dtype, indices: Tensor | None) -> Tensor | None:
        position_bias = self.rel_pos_bias
        if position_bias is None:
            return None
        if indices is not None:
            return position_bias(indices).to(dtype)
        return made_once((position_bias, dtype), lambda: position_bias().to(dtype))

    def _projections(self, device: torch.device) -> Projections:
        """`weights` for a device, padded and in the dtype of its products once for a step, or for a sampling chain.

        While compiling they are made in each graph: a compiler fuses padding and cast, and a guard on what is shared
        would fail at each step.
        """
        padding = head_padding(self.head_dim, device)
        if padding == 0 or torch.compiler.is_compiling():
            return self.weights(padding)
        of_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if of_autocast else torch.float32
        if self.shared is None or not torch.is_grad_enabled():
            return made_once((self, padding, dtype), lambda: _in_dtype(self.weights(padding), dtype))
        if dtype not in self.shared:
            self.shared[dtype] = _in_dtype(self.weights(padding), dtype)
        return self.shared[dtype]

    def weights(self, padding: int) -> Projections:
        """Weights of qkv, bias of qkv and weights of proj for heads that are wider by `padding` channels of zeros.

        Queries, keys and values get zero channels, which proj ignores: the result is the same, and no activation is
        copied.
        """
        qkv_weight, qkv_bias, proj_weight = self.qkv.weight, self.qkv.bias, self.proj.weight
        if padding == 0:
            return qkv_weight, qkv_bias, proj_weight
        rows = (3 * self.num_heads, self.head_dim)
        columns = (self.num_heads, self.head_dim)
        return (
            F.pad(qkv_weight.unflatten(0, rows), (0, 0, 0, padding)).flatten(0, 1),
            None if qkv_bias is None else F.pad(qkv_bias.unflatten(0, rows), (0, padding)).flatten(),
            F.pad(proj_weight.unflatten(1, columns), (0, padding)).flatten(1),
        )


def _in_dtype(projections: Projections, dtype: torch.dtype) -> Projections:
    """Their cast to the dtype of autocast, which does the same with float32 weights, but at each use."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor

    qkv_weight, qkv_bias, proj_weight = projections
    return cast(qkv_weight), None if qkv_bias is None else cast(qkv_bias), cast(proj_weight)


@contextmanager
def shared_projections(model: nn.Module) -> Iterator[None]:
    """Context of one training step, whose passes share padded projections; gradients go back to the stored weights.

    No weight may change within it. What is shared belongs to the modules and not to a thread, since a GPU's backward
    pass recomputes blocks in a thread of its own. Several backward passes may go through what is shared, since padding
    and cast keep nothing for them.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.shared = {}
    try:
        yield
    finally:
        for attention in attentions:
            attention.shared = None


def head_padding(head_dim: int, device: torch.device) -> int:
    """Channels of zeros to add to each head.

    On CUDA the fused kernels with a bias need a multiple of 16 bytes of channels, 8 channels in bf16; otherwise
    `scaled_dot_product_attention` stores all scores in memory. EDT's heads have 52 channels.
    """
    return -head_dim % 8 if device.type == "cuda" else 0


def is_written_out(q: Tensor, bias: Tensor | None, amm: Tensor | None) -> bool:
    """Whether to compute the scores [N, H, T, T] explicitly instead of with `scaled_dot_product_attention`.

    On CPU its fused kernel has no gradient for the bias: in training it falls back to a general path, which takes 1.1
    times as long in fp32 and 3 times in bf16 as the three plain operations (forward and backward, EDT-S at 256 px).
    Without gradients the fused kernel is 1.3 to 3 times as fast in fp32, and needs no memory for the scores. With
    modulation it has twice the keys, which is worth it only if the scores do not fit into the caches.
    """
    if q.device.type != "cpu":
        return False
    if bias is not None and bias.requires_grad:
        return True
    return amm is not None and q.shape[2] < _FUSED_FROM


def written_out_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, amm: Tensor | None = None
) -> Tensor:
    """(softmax(scale · q kᵀ + bias) · amm) v: [N, H, T, D/H] each, bias [H, T, T], amm [T, T] or [N, 1, T, T].

    The softmax sums in float32 even if scores and weights are bf16: PyTorch's CPU kernel does so.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1).to(v.dtype)
    if amm is not None:
        weights = weights * amm.to(v.dtype)
    return weights @ v


def fused_modulated_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, peak: Tensor) -> Tensor:
    """(softmax(scale · q kᵀ + bias) · amm) v in a fused kernel, without storing the scores: [N, H, T, D/H] each.

    Every key occurs twice, with its value and with a value of zeros, with the shares A = amm / peak and 1 - A of its
    weight, where peak is the largest number in amm. The two shares add up to the weight, so the softmax's denominator
    is unchanged: the result is exact, without another normalisation. `mask`, [H or 1, T, 2T], contains the logarithms
    of the shares, see `modulation_mask`.
    """
    keys, values = torch.cat([k, k], dim=2), torch.cat([v, torch.zeros_like(v)], dim=2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.unsqueeze(0), scale=scale) * peak.to(v.dtype)


def modulation_mask(amm: Tensor, bias: Tensor | None) -> Tensor:
    """The mask to add to the scores of the duplicated keys: amm [T, T], bias [H, T, T] -> [H or 1, T, 2T] float32."""
    share = amm.float() / amm[0, 0].float()  # a token's factor for itself is the largest
    logarithms = torch.stack([share.log(), (-share).log1p()], dim=1).clamp(min=_NEVER)  # T, 2, T
    mask = logarithms.unsqueeze(0) if bias is None else logarithms + bias.unsqueeze(2)
    return mask.flatten(2)


class ResidualBlock(nn.Module):
    """A block of two residual branches, attention and feed-forward.

    `predict(branch, compute)`, if there is one, returns the output of the branch "attn" or "mlp": of `compute()`, or
    predicted from earlier outputs. A sampler sets it for a chain.
    """

    predict: Callable[[str, Callable[[], Tensor]], Tensor] | None = None

    def branch(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The output of a branch [N, T, D], before any gate."""
        return compute() if self.predict is None else self.predict(name, compute)


class Block(ResidualBlock):
    """Transformer block with adaLN-Zero conditioning (DiT, arXiv 2212.09748)."""

    def __init__(self, attention: Attention, cond_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        dim = attention.proj.in_features
        self.norm1 = AdaptiveLayerNorm(dim)
        self.attn = attention
        self.norm2 = AdaptiveLayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = adaln_projection(cond_dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor, indices: Tensor | None = None) -> Tensor:
        """Mix tokens x [N, T, D] under the conditioning c [N, K] -> [N, T, D]; `indices` as in `Attention`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.branch("attn", partial(self._attend, x, shift1, scale1, indices))
        return x + gate2.unsqueeze(1) * self.branch("mlp", partial(self._feed, x, shift2, scale2))

    def _attend(self, x: Tensor, shift: Tensor, scale: Tensor, indices: Tensor | None) -> Tensor:
        out: Tensor = self.attn(self.norm1(x, shift, scale), indices)
        return out

    def _feed(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.norm2(x, shift, scale))
        return out
