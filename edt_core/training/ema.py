"""Averages of the weights: exponential moving averages, and power-function averages (arXiv 2312.02696)."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from edt_core.training.posthoc.profile import exponent, rate
from edt_core.training.shard.rows import own_state


class EMA:
    """float32 averages of a model's state: for each decay, then for each width of a power-function average.

    average <- average + rate * (value - average), where the rate of a decay is 1 - decay, and that of a width depends
    on the step. `averages[0]`, of the first decay, is used for sampling. Fixed position embeddings are part of the
    state dict and average to themselves; tensors that are not floating-point, such as indices, stay unchanged. With
    `names`, only those tensors have averages. Those of a width are of trained parameters alone. With `owned`, this rank
    has the averages of those tensors alone, but for the first `whole` averages, which every rank has.
    """

    def __init__(
        self,
        model: nn.Module,
        decays: Sequence[float],
        names: Collection[str] | None = None,
        widths: Sequence[float] = (),
        owned: Collection[str] | None = None,
        whole: int = 0,
    ) -> None:
        self.decays, self.whole = tuple(decays), whole
        self._exponents = tuple(exponent(width) for width in widths)
        state = own_state(model)  # shares the model's memory, so that an update need not walk its modules
        self._values = {name: value for name, value in state.items() if names is None or name in names}
        self._averaged = [name for name, value in self._values.items() if value.is_floating_point()]
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        averaged = [self._values for _ in decays]
        averaged += [{name: value for name, value in self._values.items() if name in trained} for _ in widths]
        self.averages = [
            {
                name: _float32(value.detach()).clone()
                for name, value in values.items()
                if owned is None or place < whole or name in owned
            }
            for place, values in enumerate(averaged)
        ]

    @property
    def of_widths(self) -> list[dict[str, Tensor]]:
        """The power-function averages, in the order of the widths."""
        return self.averages[len(self.decays) :]

    def changing_rates(self, step: int | None) -> list[float]:
        """The rates of the power-function averages in the update after `step` steps, counted from 1."""
        if not self._exponents:
            return []
        assert step is not None, "the rates of power-function averages depend on the step"
        return [rate(exponent, step) for exponent in self._exponents]

    @torch.no_grad()
    def update(self, without: Collection[str] = (), *, step: int | None = None) -> None:
        """Update each average, all its tensors but those named `without` in one fused call.

        `step`: the number of steps with this one, which averages of a width need.
        """
        names = [name for name in self._averaged if name not in without]
        values = {name: self._values[name].float() for name in names}
        rates = [*(1.0 - decay for decay in self.decays), *self.changing_rates(step)]
        for average, weight in zip(self.averages, rates, strict=True):
            own = [name for name in names if name in average]
            if own:
                torch._foreach_lerp_([average[name] for name in own], [values[name] for name in own], weight)

    def load(self, averages: Sequence[Mapping[str, Tensor]]) -> None:
        """Load the averages, in order. Raises KeyError if a tensor is missing."""
        for average, saved in zip(self.averages, averages, strict=True):
            for name, value in average.items():
                value.copy_(saved[name])


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
