"""The update of the weights in one compiled pass: clipping, Adan, and the averages of the weights.

The library's Adan goes over lists of all tensors, about 15 times a step; compiled, each element is read and written
once. A function is compiled for the tensors of one block, and serves all blocks of the same shapes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edt_core.training.draws import to_device
from edt_core.training.ema import EMA
from edt_core.training.speed.compiled import Backend, allow_graphs

_STATES = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")
Update = Callable[..., None]


@dataclass(frozen=True)
class Part:
    """Parameters of one block in one group of the optimizer, by its number, and their names."""

    group: int
    names: list[str]
    parameters: list[nn.Parameter]


class CompiledUpdate:
    """Does what `clip_gradients`, Adan's `step` and `EMA.update` do, but for the last bits; the state is Adan's own.

    It updates nothing if a parameter has no gradient, or no state yet, as at the first step: the library does that one.
    A `masked` update reads on the device whether to change anything, so that the host need not know first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        backend: Backend = "inductor",
        *,
        masked: bool = False,
        heads: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """The optimizer is the library's Adan, with the parameters of the model and of `heads`.

        The heads' parameters, by names that the model does not have, have no average. Rows of the model's parameters
        that the optimizer has instead of them are given as heads too, by the model's names.
        """
        self.masked = masked
        self._optimizer: Any = optimizer
        named = {**dict(model.named_parameters()), **(heads or {})}
        self._parts = list[Part]()
        for number, group in enumerate(optimizer.param_groups):
            owned = {id(parameter) for parameter in group["params"]}
            names = [name for name, parameter in named.items() if id(parameter) in owned]
            for of_block in by_block(names).values():
                self._parts.append(Part(number, of_block, [named[name] for name in of_block]))
        self._ema, self._trained = ema, frozenset(name for part in self._parts for name in part.names)
        allow_graphs()
        self._updates = [
            torch.compile(_updater(group, ema.decays, masked), backend=backend, dynamic=False)
            for group in optimizer.param_groups
        ]

    @torch.no_grad()
    def rehearse(self) -> None:
        """Compile for the tensors of each block, with zeros in place of the weights; every parameter needs a gradient.

        An error of the compiler comes here, before a weight is changed.
        """
        seen = set[tuple[int, Any]]()
        for part in self._parts:
            own = part.parameters
            shapes = tuple((p.shape, p.stride(), p.dtype, p.grad is not None and p.grad.stride()) for p in own)
            if (part.group, shapes) in seen or any(parameter.grad is None for parameter in own):
                continue
            seen.add((part.group, shapes))
            weights = [torch.zeros_like(parameter.detach()) for parameter in own]
            gradients = [torch.zeros_like(parameter.grad) for parameter in own if parameter.grad is not None]
            states = [[torch.zeros_like(weight) for weight in weights] for _ in _STATES]
            averages = [[torch.zeros_like(value) for value in values] for values in self._averages(part.names)]
            numbers = torch.ones(6 + len(self._ema.of_widths), dtype=own[0].dtype, device=own[0].device)
            self._updates[part.group](weights, gradients, states, averages, numbers)

    @torch.no_grad()
    def __call__(self, clip: Tensor | None, wanted: Tensor | None = None, step: int | None = None) -> bool:
        """Update weights and averages with gradients times `clip`, [] on their device; return whether it did.

        `step`: the number of steps with this one, which averages of a width need.

        If `wanted`, bool [] on the device, is false, a masked update leaves every tensor as it is. Its step is counted
        all the same, since the host does not know; going back to a checkpoint restores the count.
        """
        optimizer = self._optimizer
        if not self._parts:  # another rank owns each weight
            self._ema.update(step=step)
            return True
        if any(p.grad is None or p not in optimizer.state for part in self._parts for p in part.parameters):
            return False
        rates = self._ema.changing_rates(step)
        numbers = []
        for group in optimizer.param_groups:
            group["step"] += 1
            numbers.append(self._numbers(group, clip, wanted, rates))
        for part in self._parts:
            self._updates[part.group](
                [parameter.detach() for parameter in part.parameters],
                [parameter.grad for parameter in part.parameters],
                [[optimizer.state[parameter][name] for parameter in part.parameters] for name in _STATES],
                self._averages(part.names),
                numbers[part.group],
            )
        self._ema.update(without=self._trained, step=step)
        return True

    def _averages(self, names: list[str]) -> list[list[Tensor]]:
        """The averages of some tensors, of one block or of a head, which has none."""
        return [[average[name] for name in names if name in average] for average in self._ema.averages]

    def _numbers(
        self, group: dict[str, Any], clip: Tensor | None, wanted: Tensor | None, rates: Sequence[float]
    ) -> Tensor:
        """The numbers that change from step to step, [6 + widths], on the device: else each would need a new graph."""
        first, second, third = (self._optimizer.debias(beta, group["step"]) for beta in group["betas"])
        rate, decay = group["lr"], group["lr"] * group["weight_decay"]
        weight = self._parts[0].parameters[0]
        numbers = torch.tensor(
            [
                rate / first,
                rate * group["betas"][1] / second,
                third**0.5,
                1.0 - decay if group["weight_decouple"] else 1.0 + decay,
                1.0,
                1.0,
                *rates,
            ],
            dtype=weight.dtype,
        )
        numbers = to_device(numbers, weight.device)
        if clip is not None:
            numbers[4] = clip
        if wanted is not None:
            numbers[5] = wanted
        return numbers


def by_block(named: Iterable[str]) -> dict[str, list[str]]:
    """The names of parameters by the block that they belong to, such as `blocks.3`; "" for those of no block."""
    blocks: dict[str, list[str]] = {}
    for name in named:
        group, number = [*name.split("."), ""][:2]
        blocks.setdefault(f"{group}.{number}" if number.isdigit() else "", []).append(name)
    return blocks


def _updater(group: dict[str, Any], decays: tuple[float, ...], masked: bool) -> Update:
    """The function to compile: it updates tensors in place, in the order of operations of the library's Adan."""
    (beta1, beta2, beta3), eps = group["betas"], group["eps"]
    has_decay, decouple = group["weight_decay"] != 0.0, group["weight_decouple"]

    def update(
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[list[Tensor]],
        averages: list[list[Tensor]],
        numbers: Tensor,
    ) -> None:
        step, difference_step, correction, decay, clip, wanted, *changing = numbers.unbind()
        rates: list[Any] = [*(1.0 - rate for rate in decays), *(rate.float() for rate in changing)]

        def put(target: Tensor, value: Tensor) -> Tensor:
            return target.copy_(torch.where(wanted > 0, value, target) if masked else value)

        for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            mean, difference_mean, square_mean, negative = (state[index] for state in states)
            clipped = gradient * clip
            difference = negative + clipped
            put(mean, mean.lerp(clipped, 1.0 - beta1))
            put(difference_mean, difference_mean.lerp(difference, 1.0 - beta2))
            sum_ = difference * beta2 + clipped
            put(square_mean, (square_mean * beta3).addcmul(sum_, sum_, value=1.0 - beta3))
            scale = square_mean.sqrt() / correction + eps
            new = weight * decay if has_decay and decouple else weight
            new = new - step * (mean / scale) - difference_step * (difference_mean / scale)
            put(weight, new / decay if has_decay and not decouple else new)
            put(negative, -clipped)
            for average, rate in zip(averages, rates, strict=True):
                if average:
                    put(average[index], average[index].lerp(weight.float(), rate))

    return update
