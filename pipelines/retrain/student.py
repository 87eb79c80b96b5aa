"""A distillation: the run that made a model, with that model as the teacher of a student that samples in few steps.

The images, the autoencoder and the classifier are the teacher's, and so is the recipe but for what `_recipe` changes.
The student is a model of its own name: it has another protocol than its teacher, and a program that uses the teacher's
alias must not get a model for other steps.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edt_core.config import ChainConfig, TrainConfig, recorded_fields
from edt_core.diffusion import Objective, objective_of
from edt_core.errors import UserError
from jobs.commands.options import parse_assignment, validated
from pipelines.config.guide import PipelineSampleConfig
from pipelines.config.schema import PipelineConfig, assign
from pipelines.registry.lookup import find
from pipelines.retrain.kept_values import kept_values
from pipelines.retrain.line import record_of_version
from pipelines.tracking.catalog import Catalog

MOST_PARTS = 8  # steps of the teacher in one of the student, unless they are given
SHARE = 2  # a distillation has half of the steps of the teacher's training
RATE_SHARE = 4  # and a quarter of its learning rate: a trained model must not be moved away from its minimum
_NOT_TAKEN_OVER = ("retrain", "ladder", "along", "prune")  # sections of the teacher's run
_UNGUIDED: Mapping[str, Any] = {
    "cfg_scale": 1.0,
    "cfg_power": None,
    "guidance_interval": None,
    "cache": None,
    "sde_diffusion": "sigma",
}
_WITHOUT_AMM: Mapping[str, Any] = {"amm_blocks": (), "amm_radius": None, "amm_radius_rows": None, "amm_kernel": None}


@dataclass(frozen=True)
class Request:
    """What a person asks for. `name` of the student, `teacher_steps` and `train_steps` are None for the usual ones."""

    teacher: str
    store: str
    steps: int
    name: str | None = None
    teacher_steps: int | None = None
    train_steps: int | None = None
    assignments: Sequence[str] = ()


@dataclass(frozen=True)
class Distillation:
    """A distillation that can be planned or run."""

    config: PipelineConfig
    teacher: Any  # the version

    @property
    def name(self) -> str:
        """The student's."""
        (name,) = self.config.models
        return name


def student_name(teacher: str, steps: int) -> str:
    """The usual name of a student: edt-s-2-256-4-steps, also of a teacher that is a student itself."""
    return f"{re.sub(r'-[0-9]+-steps$', '', teacher)}-{steps}-steps"


def prepare(catalog: Catalog, request: Request) -> Distillation:
    """The distillation of a registered version. Writes nothing.

    Raises UserError for a version that no run of edt trained, for an objective without deterministic steps, and for a
    student of the teacher's own name.
    """
    version = find(catalog, request.teacher)
    record = record_of_version(catalog, version)
    own = str(version.name)
    name = request.name or student_name(own, request.steps)
    if name == own:
        raise UserError(
            f"the student would be a version of {own} itself, whose aliases lead to models of another number of steps; "
            "give it another name with --name"
        )
    before: PipelineConfig = validated(PipelineConfig, {**record.config, "store": request.store})
    _check_guidance(before.sample, f"{own}/{version.version}")
    values = kept_values(record, version, request.store)
    for section in _NOT_TAKEN_OVER:
        values.pop(section, None)
    trained = before.train_of(own)
    values["train"] = recorded_fields(trained) | _recipe(trained, version, request, before.sample)
    values["models"] = {name: {}}
    objective = objective_of(trained.objective)
    learnt = {**_UNGUIDED, **({} if trained.amm_blocks else _WITHOUT_AMM)}  # AMM of the training is the model's own
    few = _few_steps(before.sample, objective, request.steps)
    values["sample"] = {**record.config["sample"], **learnt, **few}
    values["name"] = f"{before.name}-{request.steps}-steps"
    for text in request.assignments:
        assign(values, *parse_assignment(text))
    config: PipelineConfig = validated(PipelineConfig, values)
    if config.train_of(name).distill is None:
        raise UserError("train.distill is null, but that is what distillation is; leave --set train.distill out")
    return Distillation(config, version)


def _check_guidance(protocol: PipelineSampleConfig, teacher: str) -> None:
    """Raise UserError for a teacher whose guidance needs a second network."""
    for field in ("guide", "guidance_reference"):
        if (value := getattr(protocol, field)) is not None:
            raise UserError(
                f"{teacher} is sampled with sample.{field} {value}, but a student learns only guidance away from no "
                "class, which the teacher computes by itself; distil a version that is sampled without it"
            )


def _recipe(trained: TrainConfig, version: Any, request: Request, protocol: ChainConfig) -> dict[str, Any]:
    """The fields of `train` that a distillation changes."""
    steps = request.train_steps or max(1, trained.max_steps // SHARE)
    return {
        "init_from": f"models:/{version.name}/{version.version}",
        "init_weights": "ema",
        "init_optimizer": "fresh",
        "distill": _distill(trained, request, protocol),
        "max_steps": steps,
        "max_epochs": None,
        "max_hours": None,
        "lr": trained.lr / RATE_SHARE,
        "lr_final": min(trained.lr_final, trained.lr / RATE_SHARE),
        "warmup_steps": min(trained.warmup_steps, steps // 4),
        # A student learns one loss on the teacher's times, of labels with which it is sampled.
        "masked_loss": False,
        "align": None,
        "align_block": None,
        "align_target_block": None,
        "align_features": TrainConfig.model_fields["align_features"].default,
        "align_distance": None,
        "align_weight": None,
        "min_snr_gamma": None,
        "timestep_sampler": "uniform",
        "time_shift": 1.0,
        "trainable": "all",
        "class_dropout_prob": 0.0,
        "keep_every": None,
        "patience": None,
        "seeds": (),
        "seed": trained.seed,
    }


def _distill(trained: TrainConfig, request: Request, protocol: ChainConfig) -> dict[str, Any]:
    """How the teacher makes the student's steps: its own protocol, with a deterministic sampler."""
    parts = min(MOST_PARTS, -(-protocol.num_sampling_steps // request.steps))
    steps = request.teacher_steps or parts * request.steps
    objective = objective_of(trained.objective)
    chain = {name: getattr(protocol, name) for name in ChainConfig.model_fields}
    own = recorded_fields(ChainConfig(**chain))
    makes = {**own, **_few_steps(protocol, objective, steps), "sde_diffusion": "sigma"}
    return {"steps": request.steps, "teacher": {**makes, "cache": None}, "protocol": own}


def _few_steps(protocol: ChainConfig, objective: Objective, steps: int) -> dict[str, Any]:
    return {"sampler": objective.preview_sampler, "num_sampling_steps": steps, "time_shift": protocol.time_shift}
