"""How much each linear layer of a model loses by quantisation, measured on calls of the model's own chain.

Legend: N = samples, C = latent channels, h = side of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edt_core.models import DiffusionTransformer
from edt_core.models.quantized.linear import QuantizedLinear
from edt_core.models.quantized.model import called_layers, quantizable
from edt_core.models.quantized.record import Quantization
from edt_core.sampling.sampler import Classify, LatentSampler

if TYPE_CHECKING:
    from edt_core.config import ChainConfig

Call = tuple[Tensor, Tensor, Tensor]  # latents [N, C, h, h], times [N], labels [N] of one call of a model
_TINY = 1e-30  # norm of an output that is zero, as of a layer that starts at zero


@dataclass(frozen=True)
class LayerError:
    """The relative errors ||y_q - y|| / ||y|| of a layer's output when it alone is quantised, one for each call.

    A layer that no call of a chain uses, such as those of masked training, has none.
    """

    name: str
    kind: str
    weights: int
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the calls; 0 without calls."""
        return float(np.mean(self.errors)) if self.errors else 0.0

    @property
    def worst(self) -> float:
        """The largest over the calls; 0 without calls."""
        return max(self.errors, default=0.0)


@dataclass
class _Recorder:
    """A network in place of a model, which keeps what it is called with."""

    model: DiffusionTransformer
    calls: list[Call] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((x.clone(), t.clone(), y.clone()))
        output: Tensor = self.model(x, t, y)
        return output


def balanced_labels(samples: int, num_classes: int) -> list[int]:
    """A class for each sample: all of them equally often up to one, or evenly spaced ones of many."""
    return [
        index * num_classes // samples if samples < num_classes else index % num_classes for index in range(samples)
    ]


def calls_of_chain(
    model: DiffusionTransformer,
    chain: ChainConfig,
    num_timesteps: int,
    *,
    samples: int,
    count: int,
    seed: int,
    guide: DiffusionTransformer | None = None,
    classify: Classify | None = None,
) -> tuple[list[Call], int]:
    """`count` calls of a chain of `samples` samples of a seed, evenly spaced from the first to the last; and how many
    calls the chain has. The model stays as the chain sets it, with its AMM.
    """
    recorder = _Recorder(model)
    sampler = LatentSampler(model, chain, num_timesteps, guide, network=recorder, classify=classify)
    with torch.no_grad():
        sampler(balanced_labels(samples, model.config.num_classes), seed, range(samples))
    calls = recorder.calls
    places = np.unique(np.linspace(0, len(calls) - 1, min(count, len(calls))).round().astype(int))
    return [calls[place] for place in places], len(calls)


@torch.no_grad()
def layer_errors(
    model: DiffusionTransformer, calls: Sequence[Call], scheme: str, group_size: int | None = None
) -> list[LayerError]:
    """The errors of each layer that can be quantised, in forward order, with the inputs that it has in float32.

    Raises UserError as `edt_core.models.quantized.linear.check_scheme`.
    """
    layers = quantizable(model)
    quantization = Quantization(scheme, tuple(layers), group_size)
    errors: dict[str, list[float]] = {name: [] for name in layers}
    hooks = [layer.register_forward_hook(_measure(layer, quantization, errors[name])) for name, layer in layers.items()]
    try:
        with called_layers(model):
            for call in calls:
                model(*call)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        LayerError(name, model.kind(name), layer.weight.numel(), tuple(errors[name])) for name, layer in layers.items()
    ]


def _measure(layer: nn.Linear, quantization: Quantization, errors: list[float]) -> Callable[..., None]:
    """A hook that appends the error of the quantised layer for the input of a call."""
    quantized = QuantizedLinear(layer, quantization)

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        norm = float(output.norm())
        errors.append(float((quantized(*inputs) - output).norm()) / max(norm, _TINY) if norm else 0.0)

    return hook


def chosen_layers(errors: Sequence[LayerError], keep_error: float) -> tuple[str, ...]:
    """The layers to quantise: those that a chain uses, with no error above `keep_error`."""
    return tuple(layer.name for layer in errors if layer.errors and layer.worst <= keep_error)


def error_rows(errors: Sequence[LayerError], quantized: Sequence[str]) -> list[Mapping[str, object]]:
    """The table of errors, the largest first, with how each layer is stored."""
    outcome = {True: "quantised", False: "float"}
    return [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "weights": layer.weights,
            "mean": layer.mean,
            "worst": layer.worst,
            "stored": outcome[layer.name in quantized],
        }
        for layer in sorted(errors, key=lambda layer: -layer.worst)
    ]
