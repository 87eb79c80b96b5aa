"""Adan (arXiv 2208.06677) by list operations, in place of pytorch_optimizer's where that is not installed.

Its update is a function of lists of tensors, so that torch.compile can fuse it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_BETAS, _EPS = (0.98, 0.92, 0.99), 1e-8  # in the `1 - beta` convention of the library


def adan_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    differences: list[Tensor],
    squares: list[Tensor],
    previous: list[Tensor],
    scalars: Tensor,
) -> None:
    """Update parameters and averages in place. `previous` are the negative gradients of the step before.

    `scalars`, float32 [3] on the device: the rates of both averages, and the correction of the square root. As tensors
    they do not make torch.compile compile each step again.
    """
    beta1, beta2, beta3 = _BETAS
    rate, difference_rate, correction = scalars.unbind()
    torch._foreach_add_(previous, gradients)
    torch._foreach_lerp_(means, gradients, 1.0 - beta1)
    torch._foreach_lerp_(differences, previous, 1.0 - beta2)
    torch._foreach_mul_(previous, beta2)
    torch._foreach_add_(previous, gradients)
    torch._foreach_mul_(squares, beta3)
    torch._foreach_addcmul_(squares, previous, previous, 1.0 - beta3)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, correction)
    torch._foreach_add_(roots, _EPS)
    steps = torch._foreach_mul(means, rate)
    torch._foreach_add_(steps, torch._foreach_mul(differences, difference_rate))
    torch._foreach_div_(steps, roots)
    torch._foreach_sub_(parameters, steps)
    torch._foreach_copy_(previous, torch._foreach_neg(gradients))


class Adan(torch.optim.Optimizer):
    """Adan without weight decay, with the state of the library's: `step` of a group, four tensors of a parameter."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, *, compile_with: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(list(parameters), {"lr": lr})
        self.update: Any = adan_update if compile_with is None else compile_with(adan_update)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            group["step"] = group.get("step", 0) + 1
            states = [self._state(parameter) for parameter in trained]
            names = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad")
            lists = [[state[name] for state in states] for name in names]
            scalars = torch.tensor(_scalars(group["lr"], group["step"]), device=trained[0].device)
            self.update([p.data for p in trained], [parameter.grad for parameter in trained], *lists, scalars)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter)
            state["previous_grad"] = -parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        return state


def _scalars(lr: float, step: int) -> list[float]:
    beta1, beta2, beta3 = _BETAS
    return [lr / (1 - beta1**step), lr * beta2 / (1 - beta2**step), math.sqrt(1 - beta3**step)]
