"""The base of EDT, DiT and MDTv2: timestep and label act through adaptive norms (adaLN-Zero)."""

from __future__ import annotations

import torch
from torch import nn

from edt_core.models.attention import Block, RelativePositionBias
from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import ModelConfig
from edt_core.models.layers import FinalLayer, LabelEmbedding, PatchEmbedding, TimestepEmbedding


class AdaLNTransformer(DiffusionTransformer):
    """Embeddings of latents, timestep and label with their names in DiT, and DiT's initial weights."""

    final_layer: FinalLayer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.x_embedder = PatchEmbedding(config.in_channels, config.patch_size, config.cond_dim)
        self.t_embedder = TimestepEmbedding(config.cond_dim)
        self.y_embedder = LabelEmbedding(config.num_classes, config.cond_dim)

    def initialize_weights(self) -> None:
        """DiT's initialisation: every block starts as the identity, and the output as zero.

        The adaptive norms of EDT's down-sampling and skip modules have no gate to set to zero and keep Xavier
        weights, as in the published model.
        """
        initialize_layers(self)
        patch_weight, patch_bias = self.x_embedder.proj.parameters()
        nn.init.xavier_uniform_(patch_weight.detach().flatten(1))  # as for the equivalent linear layer
        nn.init.zeros_(patch_bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name in ("0.weight", "2.weight"):
            nn.init.normal_(self.t_embedder.mlp.get_parameter(name), std=0.02)
        zero_outputs(self)

    @torch.no_grad()
    def fit_to_base_width(self, ratio: float) -> None:
        """Rescale new weights to muP's for a model `ratio` times as wide as its base (arXiv 2203.03466, table 8).

        Hidden matrices get variances in proportion to 1 / width, inputs those of the base, and the output is zero. By
        `initialize_weights` all but two are so already: Xavier's variance of the patches decreases with the width, and
        that of the second matrix of the timesteps does not.
        """
        patches = self.x_embedder.proj.weight
        width, inputs = patches.shape[0], patches[0].numel()
        patches.mul_(((inputs + width) / (inputs + width / ratio)) ** 0.5)
        self.t_embedder.mlp.get_parameter("2.weight").mul_(ratio**-0.5)


def initialize_layers(model: nn.Module) -> None:
    """Xavier weights for all linear layers, and small bias tables."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RelativePositionBias):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)


def zero_outputs(model: nn.Module) -> None:
    """Every block starts as the identity, and the output as zero."""
    for module in model.modules():
        if isinstance(module, Block | FinalLayer):
            _zero(module.adaLN_modulation[-1])
        if isinstance(module, FinalLayer):
            _zero(module.linear)


def _zero(layer: nn.Module) -> None:
    """Set weight and bias to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
