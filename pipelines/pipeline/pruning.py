"""The step before a training that makes the model it starts from shallower: `prune` in a configuration."""

from collections.abc import Mapping
from dataclasses import replace

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.models import ModelConfig
from edt_core.training.prune.cut import shallower
from jobs.models.initial import Initial
from jobs.stages import train
from pipelines.config.schema import PipelineConfig
from pipelines.engine.step import StepFuture
from pipelines.engine.steps import Steps


def call_pruning(
    steps: Steps,
    config: PipelineConfig,
    shared: Mapping[str, StepFuture],
    name: str,
    trained: TrainConfig,
    start: Initial | None,
) -> dict[str, StepFuture]:
    """The training that learns which blocks of `start` to keep, by its role; empty without one.

    Its artifact is a checkpoint whose model is the cut one.
    """
    if config.prune.keep is None or start is None:
        return {}
    learning = config.prune.learning(trained, uncut_config(start))
    inputs = {role: shared[role] for role in ("latents", "autoencoder", "images")}
    return {"pruning": steps.step(f"prune {name}", train.STAGE, learning, **inputs, init=start)}


def cut_start(start: Initial, keep: tuple[int, int]) -> Initial:
    """The model to start from with the configuration that it has after the cut, to compare with that of the training.

    Raises UserError if its configuration is not known, or its blocks cannot be left out.
    """
    return replace(start, model_config=shallower(uncut_config(start), keep).to_dict())


def uncut_config(start: Initial) -> ModelConfig:
    """The configuration of the model to start from. Raises UserError if it is not known."""
    if start.model_config is None:
        raise UserError(
            f"prune.keep is set, but train.init_from is {start.location}, whose file does not say its blocks; register "
            "it with `edt import`, and prune the version"
        )
    return ModelConfig.from_dict(start.model_config)
