"""The registered objectives by name, and the objective of a model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edt_core.diffusion.flow import FlowMatching
from edt_core.diffusion.gaussian import Epsilon
from edt_core.diffusion.objective import Objective
from edt_core.diffusion.v_prediction import VPrediction
from edt_core.errors import UserError
from edt_core.models import ModelConfig

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (Epsilon(), VPrediction(), FlowMatching())
}


def objective_of(name: str) -> Objective:
    """The objective of a name. Raises UserError for an unknown one."""
    if not isinstance(name, str) or name not in OBJECTIVES:  # a name from a file may be of any type
        raise UserError(f"unknown objective {name!r}; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def objective_of_model(config: ModelConfig) -> Objective:
    """The objective of a model. Raises UserError if the model's output does not match it."""
    objective = objective_of(config.objective)
    if config.outputs != objective.outputs:
        raise UserError(
            f"{config.name} has the objective {config.objective!r} and an output of {config.outputs} x "
            f"{config.in_channels} channels, but that objective needs {objective.outputs} x {config.in_channels}; the "
            "model's configuration was changed: use its original model_config.json"
        )
    return objective


def objective_words() -> dict[str, str]:
    """The words for objectives in training options of other code: word -> name of the objective."""
    return {word: objective.name for objective in OBJECTIVES.values() for word in objective.words}


def train_defaults(name: Any) -> Mapping[str, Any]:
    """The fields of a recipe that an objective sets unless they are given; {} for an unknown name, or None."""
    known = OBJECTIVES.get(str(name))
    return {} if known is None else known.train_defaults


def check_training(config: "TrainConfig") -> None:
    """Raise UserError for a training recipe that its objective does not support."""
    objective = objective_of(config.objective)
    objective.times(config.timestep_sampler, config.num_timesteps, config.time_shift)
    objective.check_training(config.min_snr_gamma)


def with_objective(config: ModelConfig, name: str) -> ModelConfig:
    """The configuration with another objective and its number of outputs. Raises UserError for an unknown name."""
    return replace(config, objective=name, outputs=objective_of(name).outputs)
