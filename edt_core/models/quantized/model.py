"""The linear layers of a model that can be quantised, and a model with some of them quantised."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from edt_core.models.attention import Attention
from edt_core.models.base import DiffusionTransformer
from edt_core.models.quantized.linear import QuantizedLinear
from edt_core.models.quantized.record import Quantization

# The first layers and the last: all of an image passes through them, and they have few weights.
_ALWAYS_FLOAT = ("embeddings", "final")


def quantizable(model: DiffusionTransformer) -> dict[str, nn.Linear]:
    """The linear layers by name, in order, without those of the embeddings and the final layer.

    A layer with an odd width is left out too: int4 packs weights in pairs.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and model.kind(name) not in _ALWAYS_FLOAT and module.in_features % 2 == 0
    }


def quantized_model(model: DiffusionTransformer, quantization: Quantization) -> DiffusionTransformer:
    """A copy of a model with these layers quantised, in evaluation mode, without gradients.

    Raises UserError as `check_scheme`, and ValueError for a layer that the model does not have.
    """
    made = copy.deepcopy(model).requires_grad_(False).eval()
    quantize_layers(made, quantization)
    return made


def quantize_layers(model: DiffusionTransformer, quantization: Quantization) -> None:
    """Replace the layers of a model by quantised ones, and record them in its configuration."""
    for name in quantization.layers:
        model.set_submodule(name, QuantizedLinear(_linear(model, name), quantization))
    for attention in _attentions(model):
        attention.calls_layers = isinstance(attention.qkv, QuantizedLinear) or isinstance(
            attention.proj, QuantizedLinear
        )
    model.config = replace(model.config, quantization=quantization)
    model.built_config = replace(model.built_config, quantization=quantization)


@contextmanager
def called_layers(model: DiffusionTransformer) -> Iterator[None]:
    """Context in which attention calls its linear layers as modules, so that hooks see their inputs."""
    attentions = _attentions(model)
    before = [attention.calls_layers for attention in attentions]
    try:
        for attention in attentions:
            attention.calls_layers = True
        yield
    finally:
        for attention, value in zip(attentions, before, strict=True):
            attention.calls_layers = value


def _attentions(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ValueError(f"quantization names the layer {name!r}, but the model has no such linear layer")
    return module
