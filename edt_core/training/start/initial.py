"""The state before the first step of a training that starts from a model: a checkpoint of step 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, ModelConfig
from edt_core.training.checkpoint import Checkpoint
from edt_core.training.optim import flatten_state, restore_state
from edt_core.training.start.base import Base, ClassRows, SavedOptimizer, check_fit, class_rows, keep_statistics
from edt_core.training.start.weights import adapted_weights, label_table
from edt_core.training.state import initial_state, to_checkpoint

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_COUNTERS = ("step",)  # of an optimizer's group: the rest of a group are settings, and those are the new training's


def initial_checkpoint(
    config: TrainConfig, model_config: ModelConfig, base: Base, names: Sequence[str]
) -> tuple[Checkpoint, ClassRows]:
    """The checkpoint of step 0 of a training from a base model, and where its class rows come from.

    `names` are the names of the new model's classes, () where they are not known. Weights and all their averages are
    the base model's. Raises UserError if the base model does not fit.
    """
    check_fit(base.origin, base.config, model_config)
    if keep_statistics(base.origin, base.config.to_dict(), model_config) != model_config:
        raise UserError(
            f"train.init_from: {base.origin} was trained on latents with other statistics by channel than the new "
            "model's configuration has; make that with `keep_statistics`"
        )
    rows = class_rows(base, names, model_config.num_classes)
    state = initial_state(config, model_config)
    state.base = base.digest
    weights = {**state.model.state_dict(), **adapted_weights(base, state.model, rows, names, config.seed)}
    state.model.load_state_dict(weights)
    state.ema.load([weights] * len(state.ema.averages))
    if config.init_optimizer == "keep":
        _keep_optimizer(state.optimizer, base, config, state.model, rows)
    return to_checkpoint(state, config, 0, whole=True), rows


def _keep_optimizer(
    optimizer: torch.optim.Optimizer, base: Base, config: TrainConfig, model: DiffusionTransformer, rows: ClassRows
) -> None:
    """Take over the optimizer's state, its class rows as `rows` says. Raises UserError if it does not fit."""
    saved, problem = base.optimizer, ""
    names = {value: name for name, value in model.named_parameters()}
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    trained = [(names[value], value) for group in optimizer.param_groups for value in group["params"]]
    if saved is None:
        problem = "has no optimizer state"
    elif saved.name != config.optimizer:
        problem = f"has the state of {saved.name}, and train.optimizer is {config.optimizer}"
    elif rows.new or rows.dropped:
        problem = f"has other classes: {rows}"
    else:
        problem = _shape_problem(saved, trained, sizes)
    if saved is None or problem:
        raise UserError(
            f"train.init_optimizer is keep, but {base.origin} {problem}. Give a checkpoint of the same optimizer, "
            "shapes and classes, or set train.init_optimizer=fresh"
        )
    table = next(index for index, (name, _) in enumerate(trained) if name == label_table(model))
    tensors = _with_rows_in_order(saved.tensors, table, len(rows.rows) + 1, rows)
    _, fresh = flatten_state(optimizer)
    groups = [
        {**own, **{name: before[name] for name in _COUNTERS if name in before}}
        for own, before in zip(fresh, saved.groups, strict=True)
    ]
    restore_state(optimizer, tensors, groups)


def _shape_problem(saved: SavedOptimizer, trained: Sequence[tuple[str, Any]], sizes: Sequence[int]) -> str:
    """What of the saved state does not fit parameters in groups of these sizes; "" if all does."""
    counts = [len(group["params"]) for group in saved.groups]
    if counts != sizes:
        if sum(counts) == len(trained):
            return "has other groups of parameters, as those of another train.mup_base_width"
        head = ", perhaps with those of the head of a train.align" if sum(counts) > len(trained) else ""
        return f"has the state of {sum(counts)} parameters{head}, and this training has {len(trained)}"
    for key, value in saved.tensors.items():
        name, parameter = trained[int(key.split(".", 1)[0])]
        if value.ndim and value.shape != parameter.shape:
            return f"has a state of shape {list(value.shape)} for {name}, which has shape {list(parameter.shape)}"
    return ""


def _with_rows_in_order(tensors: Mapping[str, Tensor], table: int, length: int, rows: ClassRows) -> dict[str, Tensor]:
    order = torch.tensor([*(row for row in rows.rows if row is not None), length - 1])
    return {
        key: value[order] if key.startswith(f"{table}.") and value.ndim == 2 else value
        for key, value in tensors.items()
    }
