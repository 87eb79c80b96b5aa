"""What a search costs, before anything runs: the operations of its trials, and their time."""

from collections.abc import Mapping
from typing import Any

from edt_core.data.holdout import expected_held_out
from edt_core.training.estimate import estimate
from pipelines.plan import PlannedStep
from pipelines.setup.duration import about, timed_pace, training_seconds
from pipelines.setup.hardware import this_machine
from pipelines.studies.tune.run import step_name
from pipelines.studies.tune.search import Search
from pipelines.studies.tune.space import shown

_ACTION = "action"


def cost_rows(search: Search, planned: Mapping[str, PlannedStep]) -> list[dict[str, Any]]:
    """A row for each trial: its values, steps and operations, and whether the store has it."""
    return [
        {
            "trial": trial.name,
            **{parameter.name: shown(trial.point[parameter.field]) for parameter in search.space},
            "steps": f"{trial.steps:,}",
            "FLOPs": f"{trial.flops:.4g}",
            _ACTION: planned[step_name(trial)].action,
        }
        for trial in search.trials
    ]


def cost_text(
    search: Search, planned: Mapping[str, PlannedStep], images: int | None, tflops: float | None, on_cluster: bool
) -> str:
    """The operations of the whole search and of what is left, and its time. `tflops`: 1e12 operations a second."""
    left = [trial for trial in search.trials if planned[step_name(trial)].action != "reuse"]
    flops = sum(trial.flops for trial in left)
    total = f"{len(search.trials)} trials of {search.flops:.4g} FLOPs together"
    if not left:
        return f"{total}, all of them in the store"
    rest = "" if len(left) == len(search.trials) else f", {len(left)} of them ({flops:.4g} FLOPs) are left"
    if tflops is not None:
        return f"{total}{rest}: {about(flops / tflops / 1e12)} at {tflops:g}e12 FLOPs a second"
    return f"{total}{rest}: {_measured(search, len(left) / len(search.trials), images, on_cluster)}"


def _measured(search: Search, share: float, images: int | None, on_cluster: bool) -> str:
    """The time of a share of the trials on this machine, one after another, by some timed steps of the first."""
    if on_cluster or images is None:
        return "their time is not estimated, because they run on a cluster; give --tflops"
    train = search.config.train_of(search.trials[0].name).settled(images)
    model = search.config.model_of(search.trials[0].name, 2)
    images -= expected_held_out(train.holdout_share, images)
    machine = this_machine()
    pace = timed_pace(train, model, estimate(train, model, images).memory, machine)
    if isinstance(pace, str):
        return f"their time is not estimated: {pace}; give --tflops"
    seconds = training_seconds(train, images, pace, machine) * len(search.trials) * share
    return f"about {about(seconds)} on this machine, one after another, timed over {pace.steps} steps"
