"""A search: its trials as the models of one pipeline at the narrow width, and the configuration that follows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.printing.suggestions import suggestions
from jobs.commands.options import validated
from pipelines.config.ladder import flops_of_step
from pipelines.config.schema import PipelineConfig
from pipelines.studies.tune.space import Parameter, Point, points

# Sections of what follows the trainings.
_AFTER = ("reference_statistics", "extractors", "evaluate", "along", "validation", "promote", "retrain", "notify")
# Fields of the full training that a trial has not: other ends, what is stored beside the last weights, and rollbacks,
# because a trial that needs one has diverged.
_FULL_ONLY = {
    **dict.fromkeys(("max_epochs", "max_hours", "patience", "keep_every", "preview_every")),
    "seeds": (),
    "ema_widths": (),
    "num_to_keep": 1,
    "max_rollbacks": 0,
}
_MEASURED = 10  # times that the held-out loss is measured in a trial
_CHECKPOINTS = 4  # of a trial, from which it resumes
_AVERAGED = 10  # steps of a trial for each step that its average spans


@dataclass(frozen=True)
class Trial:
    """One training: the values of its fields, its steps, and its operations."""

    name: str
    point: Point
    steps: int
    flops: int


@dataclass(frozen=True)
class Search:
    """All trials of a search. `config`: a pipeline whose models are the trials; `given`: the user's, as raw values.

    `full_width`: of the registered model `model`, for which the recipe is searched.
    """

    given: Mapping[str, Any]
    config: PipelineConfig
    model: str
    width: int
    full_width: int
    space: tuple[Parameter, ...]
    seed: int
    trials: tuple[Trial, ...]

    @property
    def flops(self) -> int:
        """Operations of all trials together."""
        return sum(trial.flops for trial in self.trials)

    def next_values(self, point: Point) -> dict[str, Any]:
        """The user's configuration with these values, which muP adapts to the full width."""
        return _next_values(self.given, self.model, self.width, point)


def search_of(
    given: Mapping[str, Any],
    space: Sequence[Parameter],
    model: str | None,
    width: int,
    count: int,
    seed: int = 0,
    steps: int | None = None,
    budget: float | None = None,
) -> Search:
    """The search over `space` for a registered model of a configuration, with `count` trials.

    The budget of each is a number of steps, or one of operations. Raises UserError if either the trials or the
    training that follows would not be valid.
    """
    _check_budget(steps, budget)
    if given.get("ladder"):
        raise UserError("the configuration has a ladder, which fixes its trainings; search before, without `ladder`")
    full: PipelineConfig = validated(PipelineConfig, given)
    model = _chosen(model, full)
    drawn = points(space, count, seed)
    validated(PipelineConfig, _next_values(given, model, width, drawn[0]))
    full_width = full.model_of(model, 2).cond_dim
    _check_recipe(full, model, width, full_width)
    named = {f"trial-{number:02d}": point for number, point in enumerate(drawn)}
    draft = _pipeline(full, model, width, {name: (point, 1) for name, point in named.items()})
    cost = {name: flops_of_step(draft, name) for name in named}
    planned = {name: _steps(cost[name], steps, budget) for name in named}
    _check_cost(cost, steps)
    config = _pipeline(full, model, width, {name: (point, planned[name]) for name, point in named.items()})
    _check_warmup(config)
    trials = tuple(Trial(n, point, planned[n], planned[n] * cost[n]) for n, point in named.items())
    return Search(given, config, model, width, full_width, tuple(space), seed, trials)


def _next_values(given: Mapping[str, Any], model: str, width: int, point: Point) -> dict[str, Any]:
    """A model's own fields are on top of `train`, so the values go there."""
    own = {**given["models"][model], **point, "mup_base_width": width}
    return {**given, "models": {**given["models"], model: own}}


def _check_budget(steps: int | None, budget: float | None) -> None:
    if (steps is None) == (budget is None):
        raise UserError(
            "a trial needs one budget: give --steps, the same number for all, or --budget, the operations (FLOPs) of "
            "each as `edt cost` counts them"
        )


def _chosen(model: str | None, full: PipelineConfig) -> str:
    """The registered model to search for."""
    if model is None and len(full.models) == 1:
        return next(iter(full.models))
    if model is None:
        raise UserError(
            f"the configuration has {len(full.models)} models: choose one with --model {next(iter(full.models))}"
        )
    if model not in full.models:
        raise UserError(f"--model {model}: {suggestions(model, full.models, 'models')}")
    return model


def _check_recipe(full: PipelineConfig, model: str, width: int, full_width: int) -> None:
    if (start := full.train_of(model).init_from) is not None:
        raise UserError(
            f"train.init_from is {start}, but trials have the width {width}, and the weights of another width do not "
            "fit; leave it out"
        )
    if width > full_width:
        raise UserError(f"--width is {width}, more than the {full_width} of {model}; search at a narrower width")


def _pipeline(full: PipelineConfig, model: str, width: int, trials: Mapping[str, tuple[Point, int]]) -> PipelineConfig:
    """The pipeline whose models are the trials, of so many steps.

    The fewest workers train, because their number changes the last bits of the sums.
    """
    recipe = full.train_of(model)
    train = {
        **recipe.model_dump(),
        **_FULL_ONLY,
        "num_workers": recipe.worker_range[0],
        "width": width,
        "mup_base_width": width,
    }
    models = {name: {**_of_length(recipe, steps), **point} for name, (point, steps) in trials.items()}
    shared = {name: value for name, value in full.model_dump().items() if name not in _AFTER}
    values = {**shared, "name": f"{full.name}-tune", "train": train, "models": models}
    config: PipelineConfig = validated(PipelineConfig, values)
    return config


def _of_length(recipe: TrainConfig, steps: int) -> dict[str, Any]:
    """The fields of a trial that depend on its number of steps.

    The held-out loss is that of averaged weights, and the full training's average may be longer than a trial.
    """
    return {
        "max_steps": steps,
        "ema_decay": min(recipe.ema_decays[0], max(0.0, 1 - _AVERAGED / steps)),
        "validate_every": recipe.validate_every or max(1, steps // _MEASURED),
        "checkpoint_every": min(recipe.checkpoint_every, -(-steps // _CHECKPOINTS)),
    }


def _steps(cost: int, steps: int | None, budget: float | None) -> int:
    """The steps of a trial whose step has so many operations."""
    if steps is not None:
        return steps
    assert budget is not None
    if (planned := round(budget / cost)) < 1:
        raise UserError(
            f"--budget is {budget:.3g}, but one step takes {cost:.3g} FLOPs; raise it, or lower "
            "train.global_batch_size or --width"
        )
    return planned


def _check_cost(cost: Mapping[str, int], steps: int | None) -> None:
    if steps is not None and len(set(cost.values())) > 1:
        raise UserError(
            f"a step of the trials takes {min(cost.values()):.3g} to {max(cost.values()):.3g} FLOPs, so with --steps "
            "they have different budgets; give --budget, the FLOPs of each, in place of --steps"
        )


def _check_warmup(config: PipelineConfig) -> None:
    for name in config.models:
        train = config.train_of(name)
        if train.warmup_steps >= train.max_steps:
            raise UserError(
                f"train.warmup_steps is {train.warmup_steps}, but {name} has {train.max_steps} steps, so it never "
                "reaches its learning rate; lower the field or its range, or raise the budget"
            )
