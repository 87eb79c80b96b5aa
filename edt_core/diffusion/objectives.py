"""The objectives that exist, by name, and the one of a model."""

from dataclasses import replace

from edt_core.diffusion.gaussian import Epsilon
from edt_core.diffusion.objective import Objective
from edt_core.diffusion.v_prediction import VPrediction
from edt_core.errors import UserError
from edt_core.models import ModelConfig

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (Epsilon(), VPrediction())}


def objective_of(name: str) -> Objective:
    """The objective of a name. Raises UserError for one that does not exist."""
    if not isinstance(name, str) or name not in OBJECTIVES:  # it may come from a file
        raise UserError(f"unknown objective {name!r}; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def objective_of_model(config: ModelConfig) -> Objective:
    """The objective that a model was made for. Raises UserError where its output is not that objective's."""
    objective = objective_of(config.objective)
    if config.outputs != objective.outputs:
        raise UserError(
            f"{config.name} has the objective {config.objective!r} and an output of {config.outputs} x "
            f"{config.in_channels} channels, but that objective needs {objective.outputs} x {config.in_channels}; its "
            "configuration was changed: give the model_config.json that it was written with"
        )
    return objective


def objective_words() -> dict[str, str]:
    """How the training options of a checkpoint from elsewhere name the objectives: word -> name."""
    return {word: objective.name for objective in OBJECTIVES.values() for word in objective.words}


def with_objective(config: ModelConfig, name: str) -> ModelConfig:
    """The configuration of a model whose output is that of an objective. Raises UserError for an unknown name."""
    return replace(config, objective=name, outputs=objective_of(name).outputs)
