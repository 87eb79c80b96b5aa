"""DiT, the Diffusion Transformer (arXiv 2212.09748): blocks of one width over patches of latents.

Legend: N = batch, C = latent channels, h = side of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from edt_core.models.attention import Attention, Block
from edt_core.models.config import OneWidthConfig
from edt_core.models.families.adaln import AdaLNTransformer
from edt_core.models.families.amm_placements import AmmPlacement
from edt_core.models.families.depth import OneRun
from edt_core.models.families.family import Family, one_width
from edt_core.models.layers import FinalLayer, patches_to_image
from edt_core.models.masking import check_masks
from edt_core.models.positions import sincos_position_embedding


@dataclass(frozen=True, kw_only=True)
class DiTConfig(OneWidthConfig):
    """`depth` blocks of width `dim` on one grid (DiT, arXiv 2212.09748)."""

    architecture: ClassVar[str] = "dit"


class DiT(AdaLNTransformer):
    """See `DiffusionTransformer`. It has no masked pass."""

    config: DiTConfig
    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        dim, heads, grid = config.dim, config.num_heads, config.grid
        self.register_buffer("pos_embed", sincos_position_embedding(dim, grid))
        self.blocks = nn.ModuleList(
            Block(Attention(dim, heads, grid), dim, config.mlp_ratio) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(dim, config.patch_size**2 * config.out_channels, dim)
        self.finish()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Noise and variance [N, 2C, h, h] of latents x [N, C, h, h] at timesteps t [N] for labels y [N]."""
        self.check_inputs(x, t, y)
        if masks is not None:
            check_masks(self.config, masks, x.shape[0])
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = self.run_block(block, x, c)
        return patches_to_image(self.final_layer(x, c), self.config.grid, self.config.patch_size)


# Depth, width and heads: table 1 of the paper.
DIT_WIDTHS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
_FILE = "other_models/models_dit_with_amm.py"

DIT_FAMILY = Family(
    title="DiT",
    long_name="Diffusion Transformer",
    paper="arXiv 2212.09748",
    config=DiTConfig,
    model=DiT,
    sizes={
        **{
            f"DiT-{size}/{patch}": one_width(width, patch_size=patch)
            for size, width in DIT_WIDTHS.items()
            for patch in (2, 4, 8)
        },
        "DiT-Tiny/2": one_width((6, 60, 5), autoencoder_factor=4),
    },
    amm_placements=(  # none for 512 px
        AmmPlacement("DiT-S/2", (8, 10), (1.0, 1.5), _FILE),  # "when cfg=1 or cf=1.5"
        AmmPlacement("DiT-XL/2", (15, 17, 19, 22, 24), (1.0, 1.0), _FILE),  # 400k and 7000k steps, "when cfg=1"
    ),
    overridable=("depth",),
    depth=OneRun(),
)
