"""EDT, the Efficient Diffusion Transformer (arXiv 2410.23788): an hourglass of DiT blocks over latents.

Legend: N = batch, C = latent channels, h = side of the latents, T = tokens of the stage or site at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edt_core.models.attention import Attention, Block, RelativePositionBias
from edt_core.models.config import AmmKernel, ModelConfig, StageSpec
from edt_core.models.layers import (
    DownSample,
    FinalLayer,
    LabelEmbedding,
    PatchEmbedding,
    SkipConnection,
    TimestepEmbedding,
    UpSample,
    patches_to_image,
)
from edt_core.models.masking import check_masks
from edt_core.models.positions import sincos_position_embedding


class EDT(nn.Module):
    """Predicts noise and variance of noised latents, given timestep and label.

    The keys and shapes of the state dict are those of the authors' published checkpoints. The model draws no
    random numbers in `forward`: labels are dropped, and masks drawn, by whoever trains it.

    With `activation_checkpointing` set, training keeps the input of each block and computes the rest again in the
    backward pass: the gradients are the same, memory falls, a step takes about a third longer.
    """

    config: ModelConfig
    pos_embed: Tensor
    activation_checkpointing: bool = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        stages, cond_dim = config.stages, config.cond_dim
        middle = config.num_merges
        self.down_stages = stages[:middle]
        self.middle_stage = stages[middle]
        self.up_stages = stages[middle + 1 :]

        self.x_embedder = PatchEmbedding(config.in_channels, config.patch_size, cond_dim)
        self.t_embedder = TimestepEmbedding(cond_dim)
        self.y_embedder = LabelEmbedding(config.num_classes, cond_dim)
        self.register_buffer("pos_embed", sincos_position_embedding(cond_dim, stages[0].grid))
        self.blocks = nn.ModuleList(
            Block(stage.dim, stage.num_heads, stage.grid, cond_dim, config.mlp_ratio)
            for stage in stages
            for _ in stage.blocks
        )
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

        self.initialize_weights()
        self._built_kernel = config.amm_kernel
        self.set_amm(config.amm_blocks, radius=config.amm_radius)

    def initialize_weights(self) -> None:
        """DiT's initialisation: every block starts as the identity, and the output as zero.

        The adaptive norms of the down-sampling and skip modules have no gate to close and stay Xavier, as in
        the published model.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RelativePositionBias):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        patch_weight, patch_bias = self.x_embedder.proj.parameters()
        nn.init.xavier_uniform_(patch_weight.detach().flatten(1))  # as the linear layer that it is
        nn.init.zeros_(patch_bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name in ("0.weight", "2.weight"):
            nn.init.normal_(self.t_embedder.mlp.get_parameter(name), std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                _zero(module.adaLN_modulation[-1])
        _zero(self.final_layer.linear)

    def set_amm(self, blocks: Sequence[int], *, radius: float | None = None, kernel: AmmKernel | None = None) -> None:
        """Modulate attention in `blocks` (0-based, over all blocks) and nowhere else; () turns AMM off.

        Scores are cut beyond `radius` tokens of each block's own grid, None for the paper's radius, and fall with
        distance as `kernel` says, None for that of the configuration the model was built with. `config` tells what is
        set. AMM needs no training and acts in evaluation mode only, so it may change between any two calls.

        Raises:
            UserError: a block, radius or kernel that does not exist; AMM stays as it was.
        """
        kernel = self._built_kernel if kernel is None else kernel
        self.config = replace(self.config, amm_blocks=tuple(blocks), amm_kernel=kernel, amm_radius=radius)
        attentions = (module for module in self.modules() if isinstance(module, Attention))  # in block order
        for index, attention in enumerate(attentions):
            attention.set_amm(kernel if index in self.config.amm_blocks else None, radius)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Predict noise (first C channels) and the interpolation of the variance (last C channels).

        Args:
            x: noised latents [N, C, h, h], scaled to about unit variance.
            t: timesteps [N], whole or fractional, on the scale of the training's `num_timesteps`.
            y: labels [N], int64 in 0..num_classes, where num_classes is the null class.
            masks: one boolean [N, T] per masking site in forward order, True where a token is kept
                (see `mask_sites` and `draw_masks`); None masks nothing.

        Returns:
            [N, 2C, h, h], the dtype of the parameters (or of autocast).

        Raises:
            ValueError: shapes that do not fit the model.
        """
        self._check_inputs(x, t, y)
        mid_keep, down_keeps = self._assign_masks(masks, len(x))
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
            x = self._run_block(self.blocks[index], x, c)
        return x

    def _run_block(self, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        if not (self.activation_checkpointing and self.training):
            return block(x, c)
        return checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn in a block

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        config = self.config
        expected = (config.in_channels, config.latent_size, config.latent_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{config.name} takes latents of shape [N, {', '.join(map(str, expected))}] (images of "
                f"{config.image_size} pixels), but x has shape {list(x.shape)}. Build the model with the "
                "image_size, autoencoder_factor and latent_channels of these latents."
            )
        if t.shape != (len(x),) or y.shape != (len(x),):
            raise ValueError(
                f"{config.name} takes one timestep and one label a sample: for a batch of {len(x)}, t and y "
                f"must have shape [{len(x)}], but have {list(t.shape)} and {list(y.shape)}."
            )

    def _assign_masks(
        self, masks: Sequence[Tensor] | None, batch_size: int
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Masks in forward order -> the one within the first stage, and one for each down-sampling module."""
        if masks is None:
            return None, [None] * len(self.down_blocks)
        check_masks(self.config, masks, batch_size)
        if self.config.mid_mask_block is None:
            return None, masks
        return masks[0], masks[1:]


def _zero(layer: nn.Module) -> None:
    """Set weight and bias to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
