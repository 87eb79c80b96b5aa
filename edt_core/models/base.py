"""What all families have in common: what goes in and comes out, how they begin, and where AMM acts.

Legend: N = batch, C = latent channels, h = side of the latents, T = tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edt_core.models.attention import Attention
from edt_core.models.config import AmmKernel, ModelConfig


class DiffusionTransformer(nn.Module, ABC):
    """Predicts noise and variance of noised latents, or what else its objective needs, given timestep and label.

    The keys and shapes of the state dict are those of the authors' published checkpoints. A model draws no
    random numbers in `forward`: labels are dropped, and masks drawn, by the training.

    `config` tells how AMM is set now, `built_config` how it was when the model was built. With
    `activation_checkpointing` set, training keeps the input of each block and computes the rest again in the
    backward pass: the gradients are the same, memory falls, a step takes about a third longer.
    """

    config: ModelConfig
    built_config: ModelConfig
    activation_checkpointing: bool = False
    kinds: ClassVar[Mapping[str, str]] = {  # the kind of a module, by the first of these that is in its name
        "embedder": "embeddings",
        "adaLN_modulation": "adaLN",
        "attn": "attention",
        "mlp": "feed-forward",
        "down_blocks": "down",
        "up_blocks": "up",
        "concat_blocks": "skip",
        "skip_linear": "skip",
        "final_layer": "final",
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = self.built_config = config

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Predict what the objective needs; today the noise or v (C channels) and the variance (the last C channels).

        Args:
            x: noised latents [N, C, h, h], scaled to about unit variance.
            t: timesteps [N], whole or fractional, on the scale of the training's `num_timesteps`.
            y: labels [N], int64 in 0..num_classes, where num_classes is the null class.
            masks: what `draw_masks` draws for the last rows of the batch; those before are not masked. None masks none.

        Returns:
            [N, 2C, h, h], the dtype of the parameters (or of autocast).

        Raises:
            ValueError: shapes that do not fit the model.
        """

    def finish(self) -> None:
        """What a constructor ends with: initial weights, and AMM as configured."""
        self.initialize_weights()
        self.set_amm(self.config.amm_blocks, radius=self.config.amm_radius)

    @abstractmethod
    def initialize_weights(self) -> None:
        """Draw the initial weights from PyTorch's global generator."""

    def set_amm(self, blocks: Sequence[int], *, radius: float | None = None, kernel: AmmKernel | None = None) -> None:
        """Modulate attention in `blocks` (0-based, over all blocks) and nowhere else; () turns AMM off.

        Scores are cut beyond `radius` tokens of each block's own grid, None for the paper's radius, and fall with
        distance as `kernel` says, None for that of the configuration the model was built with. `config` tells what is
        set. AMM needs no training and acts in evaluation mode only, so it may change between any two calls.
        Source: arXiv 2410.23788, Attention Modulation Matrix, which is a plug-in for trained models.

        Raises:
            UserError: a block, radius or kernel that does not exist; AMM stays as it was.
        """
        kernel = self.built_config.amm_kernel if kernel is None else kernel
        self.config = replace(self.config, amm_blocks=tuple(blocks), amm_kernel=kernel, amm_radius=radius)
        for index, attention in enumerate(self.attentions()):
            attention.set_amm(kernel if index in self.config.amm_blocks else None, radius)

    def attentions(self) -> list[Attention]:
        """The attention of each block, in forward order; not that of what only a masked pass runs through."""
        found = (module for module in self.modules() if isinstance(module, Attention))
        return list(islice(found, self.config.num_blocks))

    def masking_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that only a masked pass uses: without one they have no gradient."""
        return iter(())

    def place(self, module: str) -> str:
        """The part of the forward pass that a module is of, by its name in `named_modules()`, for a table of costs."""
        return "blocks" if module.startswith("blocks.") else "ends"

    def kind(self, module: str) -> str:
        """What a module does, by its name in `named_modules()`, for a table of costs."""
        return next((kind for part, kind in self.kinds.items() if part in module), "other")

    def run_block(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """A block's output; in training with `activation_checkpointing` nothing but its inputs is kept."""
        if not (self.activation_checkpointing and self.training):
            out: Tensor = block(*inputs)
            return out
        # Nothing is drawn in a block.
        again: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return again

    def check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Raise ValueError for shapes that do not fit."""
        config = self.config
        expected = (config.in_channels, config.latent_size, config.latent_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"{config.name} takes latents of shape [N, {', '.join(map(str, expected))}] (images of "
                f"{config.image_size} pixels), but x has shape {list(x.shape)}. Build the model with the "
                "image_size, autoencoder_factor and latent_channels of these latents."
            )
        if t.shape != (x.shape[0],) or y.shape != (x.shape[0],):
            raise ValueError(
                f"{config.name} takes one timestep and one label a sample: for a batch of {x.shape[0]}, t and y "
                f"must have shape [{x.shape[0]}], but have {list(t.shape)} and {list(y.shape)}."
            )
