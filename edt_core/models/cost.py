"""What a model costs: parameters and multiply-accumulates, counted on tensors without memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import ModelConfig
from edt_core.models.zoo import build_model


def shadow(config: ModelConfig) -> DiffusionTransformer:
    """A model whose tensors have shapes and no memory, to count on (device "meta")."""
    with torch.device("meta"):
        return build_model(config)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(model: DiffusionTransformer) -> int:
    """Multiply-accumulates of one forward pass for one image; a billion of them is the papers' "GFLOP".

    Counted are matrix products: linear layers, convolutions, and in attention scores and weighted sums. Not counted are
    biases, norms, activations, softmax, modulation, look-ups and gates.
    """
    config = model.config
    x = torch.empty(1, config.in_channels, config.latent_size, config.latent_size, device="meta")
    label = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(config).eval()(x, label, label)
    return counter.get_total_flops() // 2
