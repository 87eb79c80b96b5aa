"""The base class of all model families: inputs and outputs, initial weights, and attention modulation (AMM).

Legend: N = batch, C = latent channels, h = side of the latents, T = tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edt_core.models.attention import Attention, AttentionForm
from edt_core.models.config import AmmKernel, ModelConfig


class BlockReached(Exception):  # noqa: N818  it is no error
    """Ends a forward pass after a block whose output is all that is needed."""


@dataclass
class WatchedBlock:
    """A block of a model, and the output of its last call, [N, T, D], None before it.

    If it `ends` the forward pass, that pass raises BlockReached.
    """

    block: nn.Module
    ends: bool = False
    output: Tensor | None = None


class DiffusionTransformer(nn.Module, ABC):
    """Predicts what its objective needs (noise and variance, for example) from noised latents, timestep and label.

    The keys and shapes of the state dict are those of the authors' published checkpoints. A model draws no
    random numbers in `forward`: the training drops labels and draws masks.

    `config` has the current AMM settings, `built_config` those the model was built with. With
    `activation_checkpointing`, training stores only the input of each block and recomputes the rest in the
    backward pass: same gradients, less memory, about a third more time per step. Under autocast the tokens between
    blocks are float32, since position embeddings are; `stream_dtype` rounds them to that dtype before each block.
    A forward pass leaves the output of a `watched` block there, and computes the same. `predict_block(block, x,
    compute)`, if it is set, returns the output of a block for the tokens x: of `compute()`, or predicted from earlier
    outputs by a sampler in its chain, or mixed with x while a training learns which blocks to leave out.
    """

    config: ModelConfig
    built_config: ModelConfig
    activation_checkpointing: bool = False
    stream_dtype: torch.dtype | None = None
    watched: WatchedBlock | None = None
    predict_block: Callable[[nn.Module, Tensor, Callable[[], Tensor]], Tensor] | None = None
    kinds: ClassVar[Mapping[str, str]] = {  # the kind of a module, by the first of these keys in its name
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
        """Predict what the objective needs, such as the noise or v (C channels) and the variance (the last C channels).

        Args:
            x: noised latents [N, C, h, h], scaled to about unit variance.
            t: times [N], whole or fractional, on the scale of the objective: timesteps of the training's
                `num_timesteps`, or 0 to 1 for flow matching.
            y: labels [N], int64 in 0..num_classes, where num_classes is the null class.
            masks: masks of `draw_masks` for the last rows of the batch; the other rows are not masked. None: no masks.

        Returns:
            [N, outputs * C, h, h], in the dtype of the parameters (or of autocast).

        Raises:
            ValueError: shapes that do not fit the model.
        """

    def finish(self) -> None:
        """Set the initial weights and the configured AMM; a subclass's constructor calls this last."""
        self.initialize_weights()
        config = self.config
        self.set_amm(config.amm_blocks, radius=config.amm_radius, radius_rows=config.amm_radius_rows)

    @abstractmethod
    def initialize_weights(self) -> None:
        """Draw the initial weights from PyTorch's global generator."""

    def set_amm(
        self,
        blocks: Sequence[int],
        *,
        radius: float | None = None,
        radius_rows: int | None = None,
        kernel: AmmKernel | None = None,
    ) -> None:
        """Modulate attention in `blocks` (0-based, over all blocks) only; () turns AMM off.

        Scores are cut off beyond `radius` tokens of each block's own grid, or the radius of `radius_rows` (see
        `amm_matrix`; None for both: the paper's radius), and decrease with distance according to `kernel` (None: the
        kernel of `built_config`). `config` has the current settings. AMM needs no training and acts in evaluation mode
        only, unless the model was built with `amm_in_training`, so it may change between any two calls.
        Source: arXiv 2410.23788, Attention Modulation Matrix, which is a plug-in for trained models.

        Raises:
            UserError: an invalid block, radius or kernel; AMM stays unchanged.
        """
        kernel = self.built_config.amm_kernel if kernel is None else kernel
        self.config = replace(
            self.config, amm_blocks=tuple(blocks), amm_kernel=kernel, amm_radius=radius, amm_radius_rows=radius_rows
        )
        for index, attention in enumerate(self.attentions()):
            attention.set_amm(kernel if index in self.config.amm_blocks else None, radius, radius_rows)
            attention.amm_in_training = self.built_config.amm_in_training

    def set_attention_forms(self, forms: Mapping[int, AttentionForm]) -> None:
        """Compute attention without masks and AMM in the form given for its number of tokens; others stay as usual."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.form = forms.get(module.grid**2 + module.extra_tokens)

    def attentions(self) -> list[Attention]:
        """The attention of each block, in forward order, without modules that only a masked pass uses."""
        modules = (module for module in self.modules() if isinstance(module, Attention))
        return list(islice(modules, self.config.num_blocks))

    def ordered_blocks(self) -> list[nn.Module]:
        """The blocks, in forward order, as `attentions`."""
        holders = (module for module in self.modules() if any(isinstance(m, Attention) for m in module.children()))
        return list(islice(holders, self.config.num_blocks))

    def masking_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that only a masked pass uses: without such a pass they have no gradient."""
        return iter(())

    def place(self, module: str) -> str:
        """The part of the forward pass that a module belongs to, by its name in `named_modules()`; for cost tables."""
        return "blocks" if module.startswith("blocks.") else "ends"

    def kind(self, module: str) -> str:
        """The kind of a module, by its name in `named_modules()`; for cost tables."""
        return next((kind for part, kind in self.kinds.items() if part in module), "other")

    def run_block(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """A block's output; training with `activation_checkpointing` stores only its inputs."""
        x, *others = inputs
        if x is not None and self.stream_dtype is not None and torch.is_autocast_enabled(x.device.type):
            inputs = (x.to(self.stream_dtype), *others)
        compute: Callable[[], Tensor] = partial(block, *inputs)
        if self.activation_checkpointing and self.training:
            # A block draws no random numbers, so their state need not be preserved.
            compute = partial(checkpoint, block, *inputs, use_reentrant=False, preserve_rng_state=False)
        out = compute() if self.predict_block is None or x is None else self.predict_block(block, x, compute)
        if self.watched is not None and block is self.watched.block:
            self.watched.output = out
            if self.watched.ends:
                raise BlockReached
        return out

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
                f"{config.name} takes one timestep and one label per sample: for a batch of {x.shape[0]}, t and y "
                f"must have shape [{x.shape[0]}], but they have shapes {list(t.shape)} and {list(y.shape)}."
            )
