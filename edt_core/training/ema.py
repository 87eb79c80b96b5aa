"""Exponential moving averages of the weights."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn


class EMA:
    """float32 averages of a model's state, one for each decay: average <- decay * average + (1 - decay) * value.

    `averages[0]`, of the first decay, is used for sampling. Fixed position embeddings are part of the state dict and
    average to themselves; tensors that are not floating-point, such as indices, stay unchanged. With `names`, only
    those tensors have averages.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float], names: Collection[str] | None = None) -> None:
        self.decays = tuple(decays)
        state = model.state_dict()  # shares the model's memory, so that an update need not walk its modules
        self._values = {name: value for name, value in state.items() if names is None or name in names}
        self._averaged = [name for name, value in self._values.items() if value.is_floating_point()]
        self.averages = [
            {name: _float32(value.detach()).clone() for name, value in self._values.items()} for _ in self.decays
        ]

    @torch.no_grad()
    def update(self, without: Collection[str] = ()) -> None:
        """Update each average, all its tensors but those named `without` in one fused call."""
        names = [name for name in self._averaged if name not in without]
        values = [self._values[name].float() for name in names]
        for decay, average in zip(self.decays, self.averages, strict=True):
            torch._foreach_lerp_([average[name] for name in names], values, 1.0 - decay)

    def load(self, averages: Sequence[Mapping[str, Tensor]]) -> None:
        """Load averages, one for each decay in order. Raises KeyError if a tensor of the model is missing."""
        for average, saved in zip(self.averages, averages, strict=True):
            for name, value in average.items():
                value.copy_(saved[name])


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
