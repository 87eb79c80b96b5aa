"""The cost of an alignment: its head, and the forward pass of the averaged model up to its target."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from edt_core.models import ModelConfig, shadow
from edt_core.models.base import BlockReached
from edt_core.training.align.head import BlockOutput
from edt_core.training.align.settings import AlignSettings, align_settings

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_BYTES = 4  # of a float32 number


def head_parameters(settings: AlignSettings | None) -> int:
    """The number of parameters of the head; 0 without an alignment."""
    return 0 if settings is None else sum((width + 1) * out for width, out in pairwise(settings.head_widths))


def align_flops(config: TrainConfig, model_config: ModelConfig) -> int:
    """Floating-point operations for one image, as `training_flops` counts: the head's, and the averaged model's."""
    settings = align_settings(config, model_config)
    if settings is None:
        return 0
    macs = settings.hidden.grid**2 * sum(width * out for width, out in pairwise(settings.head_widths))
    target = 0 if settings.target_block is None else _flops_up_to(model_config, settings.target_block)
    return 6 * macs + target


@lru_cache(maxsize=64)
def _flops_up_to(model_config: ModelConfig, block: int) -> int:
    """Floating-point operations of a forward pass for one image that ends with a block, the first being 1."""
    model, side = shadow(model_config).eval(), model_config.latent_size
    BlockOutput(model, block, ends=True)
    model.set_amm(())
    x = torch.empty(1, model_config.in_channels, side, side, device="meta")
    t, y = (torch.zeros(1, dtype=torch.int64, device="meta") for _ in range(2))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), suppress(BlockReached):
        model(x, t, y)
    return counter.get_total_flops()


def align_activations(settings: AlignSettings | None, samples: int) -> int:
    """About the bytes that the head and its distance save for the backward pass: inputs and outputs of each layer."""
    if settings is None:
        return 0
    widths = settings.head_widths
    numbers = sum(widths) + sum(widths[1:-1]) + 2 * settings.target.width
    return _BYTES * samples * settings.hidden.grid**2 * numbers
