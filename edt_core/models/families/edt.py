"""EDT, the Efficient Diffusion Transformer (arXiv 2410.23788): an hourglass of DiT blocks over latents.

Legend: N = batch, C = latent channels, h = side of the latents, T = tokens of the stage or site at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edt_core.models.attention import Attention, Block, RelativePositionBias
from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import EDTConfig, StageSpec
from edt_core.models.layers import DownSample, FinalLayer, SkipConnection, UpSample, patches_to_image
from edt_core.models.masking import check_masks
from edt_core.models.positions import sincos_position_embedding


class EDT(DiffusionTransformer):
    """Three stages that merge tokens, two that split them, long skips between; see `DiffusionTransformer`.

    Its masks: one boolean [M, T] per masking site in forward order (see `mask_sites`), True where a token is kept.
    """

    config: EDTConfig
    pos_embed: Tensor

    def __init__(self, config: EDTConfig) -> None:
        super().__init__(config)
        stages, cond_dim = config.stages, config.cond_dim
        middle = config.num_merges
        self.down_stages = stages[:middle]
        self.middle_stage = stages[middle]
        self.up_stages = stages[middle + 1 :]

        self.register_buffer("pos_embed", sincos_position_embedding(cond_dim, stages[0].grid))
        self.blocks = nn.ModuleList(_block(stage, config) for stage in stages for _ in stage.blocks)
        self.down_blocks = nn.ModuleList(
            DownSample(stage.dim, after.dim, stage.grid, cond_dim)
            for stage, after in zip(self.down_stages, stages[1 : middle + 1], strict=True)
        )
        self.up_blocks = nn.ModuleList(
            UpSample(before.dim, stage.dim, before.grid)
            for before, stage in zip(stages[middle:-1], self.up_stages, strict=True)
        )
        self.concat_blocks = nn.ModuleList(SkipConnection(stage.dim, stage.grid, cond_dim) for stage in self.up_stages)
        self.final_layer = FinalLayer(stages[-1].dim, config.patch_size**2 * config.out_channels, cond_dim)
        self.finish()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Noise and variance [N, 2C, h, h] of latents x [N, C, h, h] at timesteps t [N] for labels y [N]."""
        self.check_inputs(x, t, y)
        mid_keep, down_keeps = self._assign_masks(masks, x.shape[0])
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)

        skips = []
        for stage, down, keep in zip(self.down_stages, self.down_blocks, down_keeps, strict=True):
            skips.append(x)
            x = self._run_stage(stage, x, c, mid_keep)
            x = down(x, c, keep)
        x = self._run_stage(self.middle_stage, x, c)
        for stage, up, skip in zip(self.up_stages, self.up_blocks, self.concat_blocks, strict=True):
            x = skip(up(x), skips.pop(), c)
            x = self._run_stage(stage, x, c)

        return patches_to_image(self.final_layer(x, c), self.up_stages[-1].grid, self.config.patch_size)

    def _run_stage(self, stage: StageSpec, x: Tensor, c: Tensor, mid_keep: Tensor | None = None) -> Tensor:
        """One stage's blocks; before `mid_mask_block`, a masked token gives way to its position embedding."""
        for index in stage.blocks:
            if mid_keep is not None and index == self.config.mid_mask_block:
                x = self.pos_embed.where(~mid_keep.unsqueeze(-1), x)
            x = self.run_block(self.blocks[index], x, c)
        return x

    def _assign_masks(
        self, masks: Sequence[Tensor] | None, batch_size: int
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Masks in forward order -> the one within the first stage, and one for each down-sampling module."""
        if masks is None:
            return None, [None] * len(self.down_blocks)
        check_masks(self.config, masks, batch_size)
        whole = [torch.cat([mask.new_ones(batch_size - len(mask), mask.shape[1]), mask]) for mask in masks]
        if self.config.mid_mask_block is None:
            return None, whole
        return whole[0], whole[1:]


def _block(stage: StageSpec, config: EDTConfig) -> Block:
    bias = RelativePositionBias(stage.grid, stage.num_heads)
    return Block(Attention(stage.dim, stage.num_heads, stage.grid, bias), config.cond_dim, config.mlp_ratio)
