"""DiT, the Diffusion Transformer (arXiv 2212.09748): blocks of one width over patches of latents.

Legend: N = batch, C = latent channels, h = side of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from edt_core.models.attention import Attention, Block
from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import DiTConfig
from edt_core.models.layers import FinalLayer, patches_to_image
from edt_core.models.masking import check_masks
from edt_core.models.positions import sincos_position_embedding


class DiT(DiffusionTransformer):
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
