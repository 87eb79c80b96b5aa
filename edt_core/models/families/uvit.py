"""U-ViT (arXiv 2209.12152): timestep, label and patches are all tokens, and long skips join shallow and deep blocks.

Legend: N = batch, C = latent channels, h = side of the latents, T = tokens of the patches, D = width. The two tokens of
label and timestep come before those of the patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edt_core.models.attention import Attention, ResidualBlock
from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import OneWidthConfig
from edt_core.models.families.depth import Depth, Runs, joined_pairs
from edt_core.models.families.family import Family, ReleasedFormat, one_width, shape_of
from edt_core.models.kernels import TokenLinear
from edt_core.models.layers import PatchEmbedding, patches_to_image
from edt_core.models.masking import check_masks
from edt_core.models.positions import timestep_embedding

_EXTRA_TOKENS = 2  # of label and timestep
_PIXEL_CHANNELS = 3
_STD = 0.02  # of the initial weights of linear layers and position embeddings


@dataclass(frozen=True, kw_only=True)
class UViTConfig(OneWidthConfig):
    """An odd number of blocks: the blocks before and after the middle one are joined in pairs.

    With `final_conv` a convolution of 3x3 follows the patches of the output.
    """

    architecture: ClassVar[str] = "uvit"

    final_conv: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.depth % 2 == 0 or self.depth < 3:
            raise ValueError(
                f"{self.name}: depth is {self.depth}, but a U-ViT has one block in the middle and equally many before "
                "and after it: use an odd number, at least 3."
            )


class ExactFeedForward(nn.Module):
    """Two linear layers around an exact GELU, token by token."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(dim, hidden_dim)
        self.fc2 = TokenLinear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform: [N, T, D] -> [N, T, D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class PlainBlock(ResidualBlock):
    """A pre-norm transformer block without conditioning: the first tokens are the conditions."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.num_heads, config.grid, extra_tokens=_EXTRA_TOKENS, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ExactFeedForward(dim, int(dim * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens: [N, 2 + T, D] -> [N, 2 + T, D]."""
        x = x + self.branch("attn", partial(self._attend, x))
        return x + self.branch("mlp", partial(self._feed, x))

    def _attend(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(self.norm1(x))
        return out

    def _feed(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.norm2(x))
        return out


class LongSkipBlock(PlainBlock):
    """A block whose input is joined with the output of the one that mirrors it."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__(config)
        self.skip_linear = TokenLinear(2 * config.dim, config.dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """Join and mix: x and skip [N, 2 + T, D] -> [N, 2 + T, D]."""
        return super().forward(self.skip_linear(torch.cat([x, skip], dim=-1)))


class UViT(DiffusionTransformer):
    """See `DiffusionTransformer`. It has no masked pass. AMM treats label and timestep as at distance 0 from all."""

    config: UViTConfig
    kinds: ClassVar[Mapping[str, str]] = {
        "patch_embed": "embeddings",
        "skip_linear": "skip",
        "decoder_pred": "final",
        **DiffusionTransformer.kinds,
    }

    def __init__(self, config: UViTConfig) -> None:
        super().__init__(config)
        dim, half, channels = config.dim, config.depth // 2, config.out_channels
        self.patch_embed = PatchEmbedding(config.in_channels, config.patch_size, dim)
        self.label_emb = nn.Embedding(config.num_classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.empty(1, _EXTRA_TOKENS + config.grid**2, dim))
        self.in_blocks = nn.ModuleList(PlainBlock(config) for _ in range(half))
        self.mid_block = PlainBlock(config)
        self.out_blocks = nn.ModuleList(LongSkipBlock(config) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = TokenLinear(dim, config.patch_size**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if config.final_conv else nn.Identity()
        self.finish()

    def initialize_weights(self) -> None:
        """Truncated normal for linear layers and positions; PyTorch's defaults for the rest, label and patches too."""
        nn.init.trunc_normal_(self.pos_embed, std=_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Noise and variance [N, 2C, h, h] of latents x [N, C, h, h] at timesteps t [N] for labels y [N]."""
        self.check_inputs(x, t, y)
        if masks is not None:
            check_masks(self.config, masks, x.shape[0])
        label, patches = self.label_emb(y), self.patch_embed(x)
        timestep = timestep_embedding(t, self.config.dim).to(label.dtype)
        x = torch.cat([label.unsqueeze(1), timestep.unsqueeze(1), patches], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = self.run_block(block, x)
            skips.append(x)
        x = self.run_block(self.mid_block, x)
        for block in self.out_blocks:
            x = self.run_block(block, x, skips.pop())
        pixels = self.decoder_pred(self.norm(x)[:, _EXTRA_TOKENS:])
        out: Tensor = self.final_layer(patches_to_image(pixels, self.config.grid, self.config.patch_size))
        return out

    def place(self, module: str) -> str:
        """Shallow blocks before the middle one, the middle one, deep blocks after it; "ends" for the rest."""
        places = {"in_blocks": "shallow blocks", "mid_block": "middle block", "out_blocks": "deep blocks"}
        return places.get(module.partition(".")[0], "ends")


class _Format(ReleasedFormat):
    """Files of the authors' code: models that predict only noise, as bare state dicts (`nnet_ema.pth`)."""

    marks = ("patch_embed.proj.weight", "label_emb.weight", "decoder_pred.weight")
    labels = "label_emb.weight"
    patches = "patch_embed.proj.weight"
    output = ()
    pixels = ("decoder_pred.weight", "decoder_pred.bias")
    convolution = ("final_layer.weight", "final_layer.bias")

    def grid(self, state: Mapping[str, Tensor]) -> int:
        """Side of the square of tokens."""
        shape = shape_of(state, self.positions)
        return math.isqrt(max(0, shape[1] - _EXTRA_TOKENS)) if len(shape) == 3 else 0

    def numbers(self, state: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Whether the model ends with a convolution."""
        return {"final_conv": self.convolution[0] in state}

    def lacks_variance(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the output has as many channels as the input."""
        patch, last = shape_of(state, self.patches), shape_of(state, self.pixels[0])
        return len(patch) == 4 and len(last) == 2 and last[0] == patch[1] * patch[2] * patch[3]

    def completed(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state with zeros for the variance; the predicted noise is unchanged."""
        if not self.lacks_variance(state):
            return state
        channels = state[self.patches].shape[1]
        widened = {key: _with_zeros(state[key], 0, channels) for key in self.pixels if _is_plain(state, key)}
        widened |= {key: _with_zeros(state[key], 0, channels) for key in self.convolution if _is_plain(state, key)}
        weight = self.convolution[0]
        if weight in widened and widened[weight].ndim == 4:
            widened[weight] = _with_zeros(widened[weight], 1, channels)
        return {**state, **widened}

    def objection(self, state: Mapping[str, Tensor], is_linear: bool) -> str:
        """Rejects the authors' models of pixels, and those without a convolution, which have another noise schedule."""
        if not self.lacks_variance(state):
            return ""
        if self.channels(state) == _PIXEL_CHANNELS:
            return "with 3 channels, like the authors' models of pixels, which have no autoencoder and no null class"
        if self.convolution[0] not in state and not is_linear:
            return (
                "without a convolution at the end, as the authors' UViT-H/2 and -H/4, which they trained on the noise "
                "schedule of Stable Diffusion (betas from 0.00085 to 0.012, linear in their roots)"
            )
        return ""


def _is_plain(state: Mapping[str, Tensor], key: str) -> bool:
    """Whether a tensor exists and can be copied into another one."""
    return key in state and state[key].layout == torch.strided and not state[key].is_quantized and state[key].ndim > 0


def _with_zeros(tensor: Tensor, dim: int, channels: int) -> Tensor:
    """A tensor with twice the channels along `dim`, the second half of each group 0: [..., P·C, ...] to P·2C."""
    if tensor.shape[dim] % channels:
        return tensor
    groups = tensor.unflatten(dim, (-1, 1, channels))
    return torch.cat([groups, torch.zeros_like(groups)], dim=dim + 1).flatten(dim, dim + 2)


class _Depth(Depth):
    """Pairs of blocks that a long skip joins; the middle block stays."""

    field = "depth"

    def runs(self, config: Any) -> Runs:
        """The pairs."""
        return (joined_pairs("in_blocks", "out_blocks", config.depth // 2),)

    def fields(self, config: Any, counts: Sequence[int]) -> dict[str, Any]:
        """The depth."""
        return {"depth": 2 * counts[0] + 1}


# Blocks, width and heads of table 1 of the paper; patches of 2 are for images of 256 pixels, of 4 for 512.
_WIDTHS = {"S": (13, 512, 8), "M": (17, 768, 12), "L": (21, 1024, 16), "H": (29, 1152, 16)}

UVIT_FAMILY = Family(
    title="U-ViT",
    long_name="U-ViT",
    paper="arXiv 2209.12152",
    config=UViTConfig,
    model=UViT,
    sizes={
        **{
            f"UViT-{size}/{patch}": one_width(width, patch_size=patch, final_conv=size != "H")
            for size, width in _WIDTHS.items()
            for patch in (2, 4)
        },
        "UViT-Tiny/2": one_width((5, 64, 4), autoencoder_factor=4),
    },
    released=_Format(),
    released_sampling={
        "amm_blocks": "model",
        "sampler": "dpmsolver++",
        "num_sampling_steps": 50,
        "guidance_channels": None,
    },
    overridable=("depth",),
    depth=_Depth(),
)
