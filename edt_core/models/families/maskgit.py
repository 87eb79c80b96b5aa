"""MaskGIT, a masked generative image transformer (arXiv 2202.04200), with the blocks of DiT.

Its tokens are the codes of an autoencoder with finite scalar quantization (`codes`), one for each position of the
latents. It predicts the codes of masked positions. Tokens have no time: how many are masked is in the input.

Legend: N = batch, h = side of the latents, T = h² tokens, K = number of codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edt_core.errors import UserError
from edt_core.models.attention import Attention, Block
from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import OneWidthConfig
from edt_core.models.families.adaln import initialize_layers, zero_outputs
from edt_core.models.families.codes import LEVELS, NUM_CODES, codes_of, is_masked
from edt_core.models.families.dit import DIT_WIDTHS
from edt_core.models.families.family import Family, ReleasedFormat, one_width
from edt_core.models.layers import FinalLayer, LabelEmbedding, patches_to_image
from edt_core.models.masking import check_masks
from edt_core.models.positions import sincos_position_embedding


@dataclass(frozen=True, kw_only=True)
class MaskGITConfig(OneWidthConfig):
    """`depth` blocks of width `dim` on the grid of codes (MaskGIT, arXiv 2202.04200)."""

    architecture: ClassVar[str] = "maskgit"
    only_objective: ClassVar[str | None] = "masked_tokens"

    patch_size: int = 1
    objective: str = "masked_tokens"
    outputs: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.objective != self.only_objective:
            raise UserError(
                f"{self.name} predicts codes of masked positions, and its objective is {self.only_objective}, not "
                f"{self.objective}; set train.objective={self.only_objective}, or train another model"
            )
        if (self.in_channels, self.patch_size) != (len(LEVELS), 1):
            raise ValueError(
                f"{self.name}: latents of {self.in_channels} channels in patches of {self.patch_size}; its tokens are "
                f"codes of {len(LEVELS)} channels in patches of 1, as autoencoder.kind=fsq makes them."
            )
        if self.latents_mean is not None:
            raise UserError(
                f"train.latent_norm is true, but {self.name} reads codes from the values of the latents, which must "
                "not be normalised; set train.latent_norm=false"
            )
        if self.amm_blocks:
            raise UserError(
                f"amm_blocks is {list(self.amm_blocks)}, but attention modulation (AMM) was made and measured for "
                f"diffusion, and {self.name} predicts masked tokens; set amm_blocks=[]"
            )

    @property
    def out_channels(self) -> int:
        """A logit for each code."""
        return NUM_CODES

    def check_latents(self, counts: Mapping[str, Any]) -> None:
        """Raise UserError for latents that are no codes."""
        if counts.get("levels") != list(LEVELS):
            raise UserError(
                f"{self.name} predicts codes, but these latents are of an autoencoder without codes; fit one with "
                "autoencoder.kind=fsq, and encode the images with it"
            )


class MaskGIT(DiffusionTransformer):
    """See `DiffusionTransformer`. Its inputs are values of codes, and `MASKED` at masked positions."""

    config: MaskGITConfig
    pos_embed: Tensor

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config)
        dim, heads, grid = config.dim, config.num_heads, config.grid
        self.x_embedder = nn.Embedding(NUM_CODES + 1, dim)  # the last one is the mask
        self.y_embedder = LabelEmbedding(config.num_classes, dim)
        self.register_buffer("pos_embed", sincos_position_embedding(dim, grid))
        self.blocks = nn.ModuleList(
            Block(Attention(dim, heads, grid), dim, config.mlp_ratio) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(dim, NUM_CODES, dim)
        self.finish()

    def initialize_weights(self) -> None:
        """DiT's initialisation. The embeddings of codes are as large as those of positions, N(0, 1/2)."""
        initialize_layers(self)
        nn.init.normal_(self.x_embedder.weight, std=math.sqrt(0.5))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        zero_outputs(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Logits [N, K, h, h] of all positions, from values x [N, 4, h, h] and labels y [N]; times t are not used."""
        self.check_inputs(x, t, y)
        if masks is not None:
            check_masks(self.config, masks, x.shape[0])
        tokens = torch.where(is_masked(x), NUM_CODES, codes_of(x)).flatten(1)
        hidden: Tensor = self.x_embedder(tokens) + self.pos_embed
        c = self.y_embedder(y)
        for block in self.blocks:
            hidden = self.run_block(block, hidden, c)
        return patches_to_image(self.final_layer(hidden, c), self.config.grid, 1)


class _NoRelease(ReleasedFormat):
    """No checkpoints of others are read: the keys are those of models that were trained here."""

    marks: ClassVar[tuple[str, ...]] = ("x_embedder.weight",)
    patches: ClassVar[str] = "x_embedder.weight"
    output: ClassVar[tuple[str, ...]] = ()


MASKGIT_FAMILY = Family(
    title="MaskGIT",
    long_name="Masked Generative Image Transformer",
    paper="arXiv 2202.04200",
    config=MaskGITConfig,
    model=MaskGIT,
    sizes={
        **{f"MaskGIT-{size}": one_width(width) for size, width in DIT_WIDTHS.items()},
        "MaskGIT-Tiny": one_width((6, 60, 5), autoencoder_factor=4),
    },
    released=_NoRelease(),
    released_sampling={},
)
