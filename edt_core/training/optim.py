"""Optimizers by name, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edt_core.training.optimizers.muon import Muon

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

RATE_FACTOR = "rate_factor"  # of a group: what the learning rate of a step is multiplied with
_EPS = 1e-8  # the default of all three optimizers
_FORMS = ("foreach", "fused")  # fields of an optimizer's groups that say how it computes


@dataclass(frozen=True)
class Scale:
    """What the learning rate and the optimizer's eps of a parameter are multiplied with."""

    rate: float
    eps: float = 1.0


def make_optimizer(
    config: TrainConfig,
    parameters: Iterable[nn.Parameter],
    matrices: Mapping[Tensor, int] | None = None,
    scales: Mapping[Tensor, Scale] | None = None,
) -> torch.optim.Optimizer:
    """Adan (Xie et al. 2022, arXiv 2208.06677; betas in the `1 - beta` convention of its code), AdamW or Muon.

    `matrices` are the parameters of Muon, see `edt_core.training.optimizers.muon`; the others are AdamW's. `scales`
    are those of some parameters, see `edt_core.training.optimizers.mup`; each scale has a group of its own.
    """
    owned = list(parameters)
    groups = _by_scale(config, owned, scales or {})
    if config.optimizer == "muon":
        return Muon(groups, matrices or {}, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        on_gpu = any(parameter.is_cuda for parameter in owned)
        foreach, fused = (None, True) if on_gpu else (True, None)
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, foreach=foreach, fused=fused)
    from pytorch_optimizer import Adan

    # foreach is set because on CPU the library's default is the per-parameter path, which is 3 times as slow.
    return Adan(groups, lr=config.lr, weight_decay=config.weight_decay, foreach=True)


def _by_scale(
    config: TrainConfig, parameters: Iterable[nn.Parameter], scales: Mapping[Tensor, Scale]
) -> list[dict[str, Any]]:
    """Groups of parameters of one scale. Weight decay is divided by that of the rate, which it is multiplied by."""
    groups: dict[Scale | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(scales.get(parameter), []).append(parameter)
    return [
        {"params": own}
        if scale is None
        else {
            "params": own,
            "lr": scale.rate * config.lr,
            "weight_decay": config.weight_decay / scale.rate,
            "eps": scale.eps * _EPS,
            RATE_FACTOR: scale.rate,
        }
        for scale, own in groups.items()
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step: each group has it times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of a step: from 0 to lr in `warmup_steps`, then from lr to lr_final at the last of `total_steps`.

    The decay is linear, as in the paper, or half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5); with
    lr_schedule "constant" the rate does not decay. With "wsd" (warm-up, stable, decay; arXiv 2404.06395) it stays at lr
    and decays over the last `decay_fraction` of the steps, linearly or with `decay_shape` "1-sqrt" as 1 minus the
    square root of the part that is done (arXiv 2405.18392).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "wsd":
        stable = stable_steps(config, total_steps)
        decayed = min(max(step + 1 - stable, 0) / max(total_steps - stable, 1), 1.0)
        if config.decay_shape == "1-sqrt":
            decayed = math.sqrt(decayed)
        return config.lr + (config.lr_final - config.lr) * decayed
    progress = min((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    if config.lr_schedule == "constant":
        return config.lr
    if config.lr_schedule == "cosine":
        return config.lr_final + (config.lr - config.lr_final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr + (config.lr_final - config.lr) * progress


def stable_steps(config: TrainConfig, total_steps: int) -> int:
    """The number of first steps whose rate does not depend on `total_steps`; 0 for a decay from the start."""
    if config.lr_schedule == "constant":
        return total_steps
    if config.lr_schedule == "wsd":
        return max(total_steps - max(round(config.decay_fraction * total_steps), 1), 0)
    return 0


def decay_start(config: TrainConfig, total_steps: int) -> int | None:
    """The step before which wsd does not decay, and at which it keeps a checkpoint; None for other schedules."""
    return stable_steps(config, total_steps) or None if config.lr_schedule == "wsd" else None


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients as one vector, on their device; not finite if any gradient is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients, whose norm is `norm`, a tensor [] on their device, to a norm of at most `max_norm`.

    The host does not wait for the norm: gradients that are small enough are multiplied by 1.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, clip_factor(norm, max_norm))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients of the norm `norm` with, [] on its device, for a norm of at most `max_norm`."""
    return (max_norm / norm.double()).clamp(max=1.0).to(norm.dtype)


@dataclass(frozen=True)
class Places:
    """The parameters of a rank's optimizer by group: their indices among those of all ranks, and how many those are."""

    own: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    def groups(self, groups: Sequence[dict]) -> list[dict]:
        """The groups with the indices of the parameters of all ranks, which follow one another."""
        starts = [sum(self.sizes[:place]) for place in range(len(self.sizes))]
        ranges = [list(range(start, start + size)) for start, size in zip(starts, self.sizes, strict=True)]
        return [{**group, "params": indices} for group, indices in zip(groups, ranges, strict=True)]

    def own_groups(self, groups: Sequence[dict]) -> list[dict]:
        """Groups of all ranks with the indices of this rank's own parameters."""
        return [{**group, "params": list(own)} for group, own in zip(groups, self.own, strict=True)]


def keep_owned(optimizer: torch.optim.Optimizer, owned: Collection[nn.Parameter]) -> Places:
    """Take the parameters of other ranks from an optimizer that has no state yet; return the places of the others."""
    own, sizes = list[tuple[int, ...]](), list[int]()
    for group in optimizer.param_groups:
        numbered = list(enumerate(group["params"], start=sum(sizes)))
        sizes.append(len(numbered))
        own.append(tuple(index for index, parameter in numbered if parameter in owned))
        group["params"] = [parameter for _, parameter in numbered if parameter in owned]
    return Places(tuple(own), tuple(sizes))


def flatten_state(
    optimizer: torch.optim.Optimizer, places: Places | None = None
) -> tuple[dict[str, Tensor], list[dict]]:
    """Optimizer state as named tensors (`<parameter index>.<state name>`) and groups that JSON can store: no pickle.

    With `places` the tensors are those of this rank's parameters, and the groups those of all ranks.
    """
    state = optimizer.state_dict()
    indices = None if places is None else list(chain.from_iterable(places.own))
    tensors = {
        f"{index if indices is None else indices[index]}.{name}": torch.as_tensor(value)
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"] if places is None else places.groups(state["param_groups"])


def restore_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: Sequence[dict], places: Places | None = None
) -> None:
    """Inverse of `flatten_state`; the tensors are those of all ranks, of which each takes its own.

    How the optimizer computes, which depends on the device, stays as it is.
    """
    forms = [{form: group[form] for form in _FORMS if form in group} for group in optimizer.param_groups]
    own = None if places is None else set(chain.from_iterable(places.own))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        if own is None or int(index) in own:
            state.setdefault(int(index), {})[name] = value
    groups = groups if places is None else places.own_groups(groups)
    optimizer.load_state_dict(
        {"state": state, "param_groups": [{**saved, **form} for saved, form in zip(groups, forms, strict=True)]}
    )
