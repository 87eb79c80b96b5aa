"""The registered objectives by name, and the objective of a model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edt_core.diffusion.flow import FlowMatching
from edt_core.diffusion.gaussian import Epsilon
from edt_core.diffusion.objective import Objective, SamplerChoice
from edt_core.diffusion.tokens.masked_tokens import MaskedTokens
from edt_core.diffusion.v_prediction import VPrediction
from edt_core.errors import UserError
from edt_core.models import MODEL_NAMES, ModelConfig
from edt_core.models.zoo import family_of

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (Epsilon(), VPrediction(), FlowMatching(), MaskedTokens())
}


def objective_of(name: str) -> Objective:
    """The objective of a name. Raises UserError for an unknown one."""
    if not isinstance(name, str) or name not in OBJECTIVES:  # a name from a file may be of any type
        raise UserError(f"unknown objective {name!r}; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def objective_of_model(config: ModelConfig) -> Objective:
    """The objective of a model. Raises UserError if the model's output does not match it."""
    objective = objective_of(config.objective)
    _check_prediction(config, objective)
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


def train_defaults(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a recipe that its objective and its model set unless they are given, from those that are given.

    That is the objective where a model has only one, and what the objective sets; {} for an unknown name.
    """
    only = only_objective(fields.get("model"))
    known = OBJECTIVES.get(str(fields.get("objective", only)))
    of_model = {"objective": only} if only is not None and "objective" not in fields else {}
    return of_model if known is None else {**of_model, **known.train_defaults}


def only_objective(model: Any) -> str | None:
    """The objective of a named model whose family has only one; None for others, and for an unknown name."""
    return family_of(model).config.only_objective if model in MODEL_NAMES else None


def check_training(config: "TrainConfig") -> None:
    """Raise UserError for a training recipe that its objective does not support."""
    objective = objective_of(config.objective)
    objective.times(config.timestep_sampler, config.num_timesteps, config.time_shift)
    objective.check_training(config.min_snr_gamma)
    objective.check_recipe(config)
    if (distill := config.distill) is not None:
        objective.leap_times(config.num_timesteps, SamplerChoice.of(distill.teacher), distill.steps, distill.parts)


def with_objective(config: ModelConfig, name: str) -> ModelConfig:
    """The configuration with another objective and its number of outputs.

    Raises UserError for an unknown name, and for an objective whose prediction the model does not make.
    """
    objective = objective_of(name)
    _check_prediction(config, objective)
    return replace(config, objective=name, outputs=objective.outputs)


def _check_prediction(config: ModelConfig, objective: Objective) -> None:
    """Raise UserError for a model of numbers with an objective of codes; the reverse a configuration refuses itself."""
    if objective.of_tokens and config.only_objective != objective.name:
        models = ", ".join(name for name in MODEL_NAMES if only_objective(name) == objective.name)
        raise UserError(
            f"the objective is {objective.name}, but {config.name} predicts numbers and not codes; use one of "
            f"{models}, or the objective {', '.join(name for name, other in OBJECTIVES.items() if not other.of_tokens)}"
        )
