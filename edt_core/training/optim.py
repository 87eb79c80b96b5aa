"""Optimizers by name, and the learning rate as a function of the step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from edt_core.config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adan (Xie et al. 2022, arXiv 2208.06677; betas in the `1 - beta` convention of its code) or AdamW."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, foreach=True)
    from pytorch_optimizer import Adan

    # foreach by hand: by default the library takes the per-parameter path on CPU, which is 3 times as slow there.
    return Adan(list(parameters), lr=config.lr, weight_decay=config.weight_decay, foreach=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Falls linearly from lr at step 0 to lr_final at max_steps."""
    return config.lr + (config.lr_final - config.lr) * min(step / max(config.max_steps, 1), 1.0)


def flatten_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict]]:
    """Optimizer state as named tensors (`<parameter index>.<state name>`) and JSON-able groups: nothing to unpickle."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value if torch.is_tensor(value) else torch.tensor(value)
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def restore_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict]) -> None:
    """Inverse of `flatten_state`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
