"""A ladder: trainings of several models and widths, each under the same numbers of operations."""

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from edt_core.config import Section
from edt_core.errors import UserError
from edt_core.evaluation.config import Rung
from edt_core.evaluation.scaling import LEAST_BUDGETS, LEAST_SIZES
from edt_core.models import count_parameters, shadow
from edt_core.training.start.trainable import step_flops

if TYPE_CHECKING:
    from pipelines.config.schema import PipelineConfig

_ENDS = ("max_epochs", "max_hours", "patience")  # fields that end a training before its budget is used


class LadderConfig(Section):
    """Trainings under fixed numbers of operations, for `edt scaling`. Its rungs are the pipeline's models."""

    models: tuple[str, ...] = Field((), description="names of models; each is trained at all widths and budgets")
    widths: tuple[int, ...] = Field((), description="widths, as train.width; at least 3")
    budgets: tuple[float, ...] = Field(
        (), description="operations of a training, as `edt cost` counts them; at least 3. Empty for no ladder"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="seeds, as train.seed; each repeats all trainings")
    resamples: int = Field(500, ge=1, description="samples of the bootstrap")
    confidence: float = Field(0.9, gt=0, lt=1, description="share of the samples that an interval holds")

    @field_validator("models", "widths", "budgets", "seeds")
    @classmethod
    def _are_different(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values) or any(isinstance(value, int | float) and value < 0 for value in values):
            raise ValueError(f"{list(values)}: give different values from 0 on")
        return values

    @model_validator(mode="after")
    def _can_be_fitted(self) -> "LadderConfig":
        counts = {
            "models": (self.models, 1),
            "widths": (self.widths, LEAST_SIZES),
            "budgets": (self.budgets, LEAST_BUDGETS),
        }
        if any(values for values, _ in counts.values()):
            for name, (values, least) in counts.items():
                if len(values) < least:
                    raise ValueError(f"ladder.{name} has {len(values)} values, and a fit needs {least}; add some")
        return self

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """All trainings, by model, width, budget and seed."""
        return tuple(
            Rung(name=_name(*values), **dict(zip(("model", "width", "budget", "seed"), values, strict=True)))
            for values in product(self.models, self.widths, self.budgets, self.seeds)
        )


def _name(model: str, width: int, budget: float, seed: int) -> str:
    """The name of a rung, such as edt-tiny-2-w64-3e9-s0."""
    return f"{model.lower().replace('/', '-')}-w{width}-{budget:.3g}-s{seed}".replace("e+0", "e").replace("e+", "e")


def with_rungs(
    values: Mapping[str, Any], ladder: LadderConfig, steps: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The values of a configuration whose models are the rungs. `steps`: of each; None for one, to count its cost."""
    models = {
        rung.name: {
            "model": rung.model,
            "width": rung.width,
            "seed": rung.seed,
            "max_steps": 1 if steps is None else steps[rung.name],
        }
        for rung in ladder.rungs
    }
    return {**values, "models": models}


def flops_of_step(config: "PipelineConfig", name: str) -> int:
    """Operations of one step of a model's training, with the masked pass if it has one."""
    train = config.train_of(name)
    return train.global_batch_size * step_flops(train, config.model_of(name, 2))


def steps_of_rungs(config: "PipelineConfig") -> dict[str, int]:
    """The number of steps of each rung, whose operations are within half a step of its budget. Raises UserError."""
    steps = {}
    for rung in config.ladder.rungs:
        cost = flops_of_step(config, rung.name)
        steps[rung.name] = round(rung.budget / cost)
        if steps[rung.name] < 1:
            raise UserError(
                f"ladder.budgets has {rung.budget:.3g}, but a step of {rung.model} of width {rung.width} takes "
                f"{cost:.3g} FLOPs at train.global_batch_size {config.train.global_batch_size}; raise the budget, or "
                "lower the batch or the width"
            )
    return steps


def check_ladder(config: "PipelineConfig") -> None:
    """Raise ValueError for a recipe whose trainings would not use their budgets, or have no held-out loss."""
    train = config.train
    for name in _ENDS:
        if getattr(train, name) is not None:
            raise ValueError(
                f"train.{name} is {getattr(train, name)}, which could end trainings of the ladder before their budgets "
                "are used; leave it out"
            )
    if train.seeds:
        raise ValueError(
            f"train.seeds is {list(train.seeds)}, but the seeds of a ladder are ladder.seeds; leave train.seeds out"
        )
    if not train.holdout_share:
        raise ValueError(
            f"train.holdout is {train.holdout}, but a ladder compares held-out losses; set it to a share of the images "
            "that is at least 64 of them, such as 0.05"
        )


def cost_rows(config: "PipelineConfig") -> list[dict[str, Any]]:
    """What each rung of an expanded ladder costs: parameters, steps, operations, and images that it sees."""
    rows = []
    for rung in config.ladder.rungs:
        train = config.train_of(rung.name)
        rows.append(
            {
                "model": rung.model,
                "width": rung.width,
                "budget": rung.budget,
                "seed": rung.seed,
                "parameters": count_parameters(shadow(config.model_of(rung.name, 2))),
                "steps": train.max_steps,
                "images": train.max_steps * train.global_batch_size,
                "flops": train.max_steps * flops_of_step(config, rung.name),
            }
        )
    return rows
