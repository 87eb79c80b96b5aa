"""The guard of a retraining: the device hours it may take, by what the champion's training took per step."""

from typing import Any

from jobs.models.registry_files import title
from pipelines.config.schema import PipelineConfig


def device_hours(version: Any | None, steps: int) -> float | None:
    """Device hours that so many steps take at the pace of a version's training; None if that is not recorded.

    It holds for the same model, batch size and hardware.
    """
    tags = {} if version is None else version.tags
    try:
        hours, before = float(tags["edt.cost.device_hours"]), int(tags["edt.cost.steps"])
    except (KeyError, ValueError):
        return None
    return hours / before * steps if before > 0 else None


def over_limit(config: PipelineConfig, version: Any | None, name: str) -> str:
    """Why the training is expected to take more than `retrain.max_device_hours`; "" if it is not."""
    limit, train = config.retrain.max_device_hours, config.train_of(name)
    expected = device_hours(version, train.max_steps * len(config.trainings_of(name)))
    if limit is None or expected is None or expected <= limit:
        return ""
    affordable = max(1, int(train.max_steps * limit / expected))
    return (
        f"the training of {train.max_steps} steps takes about {expected:.3g} device hours at the pace of "
        f"{title(version)}, and retrain.max_device_hours is {limit:g}. Use --steps {affordable}, or raise the limit"
    )


def guarded(config: PipelineConfig, name: str) -> PipelineConfig:
    """The configuration, whose training ends with a checkpoint when `retrain.max_device_hours` are used up."""
    limit, train = config.retrain.max_device_hours, config.train_of(name)
    if limit is None:
        return config
    hours = limit / train.worker_range[1] / len(config.trainings_of(name))
    if train.max_hours is not None:
        hours = min(hours, train.max_hours)
    fields = {**config.models[name], "max_hours": hours}
    return config.model_copy(update={"models": {name: fields}})
