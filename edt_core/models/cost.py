"""The cost of a model: parameters, multiply-accumulates, and the operations of its training. Nothing is computed.

The forward pass, and for training the backward pass, are traced with tensors that have shapes but no memory (device
"meta"), and PyTorch's counter sums their matrix products: linear layers, convolutions, and in attention T² · D
multiply-accumulates each for the scores and for the weighted sum (T tokens of width D). Biases, norms, activations,
softmax, modulation, look-ups and gates are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import ModelConfig
from edt_core.models.masking import mask_sites
from edt_core.models.zoo import build_model


@dataclass(frozen=True)
class PartCost:
    """Multiply-accumulates for one image of all modules of one kind in one place of a model."""

    place: str
    kind: str
    macs: int


def shadow(config: ModelConfig) -> DiffusionTransformer:
    """A model whose tensors have shapes but no memory (device "meta"), for counting; a quantised one as in float."""
    with torch.device("meta"):
        return build_model(replace(config, quantization=None))


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters; of a quantised model those that it had before."""
    if isinstance(model, DiffusionTransformer) and model.config.quantization is not None:
        model = shadow(model.config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(model: DiffusionTransformer) -> int:
    """Multiply-accumulates of one forward pass for one image; the papers' "GFLOP" is a billion of them."""
    return macs_of(model.config)


@lru_cache(maxsize=64)
def macs_of(config: ModelConfig) -> int:
    """The `count_macs` of a model of this configuration."""
    return sum(_forward_macs(config).values())


def macs_by_part(config: ModelConfig) -> list[PartCost]:
    """The multiply-accumulates of `count_macs` by place and kind of module, in forward order."""
    parts: Counter[tuple[str, str]] = Counter()
    model = shadow(config)
    for module, macs in _forward_macs(config).items():
        parts[model.place(module), model.kind(module)] += macs
    return [PartCost(place, kind, macs) for (place, kind), macs in parts.items()]


@lru_cache(maxsize=64)
def training_flops(
    config: ModelConfig, *, masked: bool, prepare: Callable[[DiffusionTransformer], object] = lambda model: None
) -> int:
    """Floating-point operations (2 per multiply-accumulate) of training on one image: forward and backward pass.

    With `masked`, those of the masked pass are included, at the mean mask ratio. MDTv2's encoder processes only the
    unmasked tokens; an EDT zeroes masked tokens and processes all, so its masked pass costs as much as the full one.
    The recomputation of activation checkpointing is not counted, and neither are gradients of weights that `prepare`
    freezes.

    Raises:
        ValueError: a masked pass of a model that has none.
    """
    if masked and not config.is_masked:
        raise ValueError(f"{config.name} has no masked pass to count")
    model = shadow(config)
    prepare(model)
    counter = _count(model, _masks(config), rows=2) if masked else _count(model)  # both passes go as one batch
    return counter.get_total_flops()


def _masks(config: ModelConfig) -> list[Tensor]:
    """Masks as of `draw_masks` for one image, at the mean mask ratio."""
    form = config.mask_form
    if form is None:
        return []
    columns = [form.columns(site.tokens, sum(site.ratio_range) / 2) for site in mask_sites(config)]
    return [torch.empty(1, count, dtype=form.dtype, device="meta") for count in columns]


@lru_cache(maxsize=64)
def _forward_macs(config: ModelConfig) -> dict[str, int]:
    """Multiply-accumulates by the name of the innermost module that does them."""
    model = shadow(config)
    counts = _count(model, backward=False).get_flop_counts()
    prefix = f"{type(model).__name__}."
    whole = {name.removeprefix(prefix): sum(ops.values()) for name, ops in counts.items() if name.startswith(prefix)}
    own = Counter(whole)
    for name, flops in whole.items():
        if (parent := _parent(name, whole)) is not None:
            own[parent] -= flops
    return {name: flops // 2 for name, flops in own.items() if flops}


def _parent(name: str, names: dict[str, int]) -> str | None:
    """The innermost module of `names` that contains the module `name`; None if there is none."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return None


def _count(
    model: DiffusionTransformer, masks: list[Tensor] | None = None, *, rows: int = 1, backward: bool = True
) -> FlopCounterMode:
    """The counter after a pass of `rows` rows, the last ones masked by `masks`."""
    config = model.config
    model.train(backward).set_amm(())  # fused modulated attention would count additional products
    x = torch.empty(rows, config.in_channels, config.latent_size, config.latent_size, device="meta")
    t, y = (torch.zeros(rows, dtype=torch.int64, device="meta") for _ in range(2))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = model(x, t, y, masks)
        if backward:
            output.sum().backward()
    return counter
