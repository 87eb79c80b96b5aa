"""A pruning: the run that made a model, from that model without some of its blocks.

The images, the autoencoder, the classifier and the protocol are those of the model, and so is the recipe but for what
`_recipe` changes. The candidate is a version of the same name, so that the gate compares it with the champion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edt_core.config import TrainConfig, recorded_fields
from edt_core.errors import UserError
from edt_core.models import ModelConfig, chosen_amm_blocks, overrides_record
from edt_core.training.prune.cut import moved_blocks, shallower
from jobs.commands.options import parse_assignment, validated
from jobs.models.initial import named_model
from pipelines.config.schema import PipelineConfig, assign
from pipelines.registry.lookup import find
from pipelines.retrain.kept_values import kept_values
from pipelines.retrain.line import record_of_version
from pipelines.tracking.catalog import Catalog

SHARE = 2  # the fine-tuning has half of the steps of the model's training, and half of its learning rate
MASK_SHARE = 10  # and which blocks to keep is learnt in a tenth of them
_FEW = 20  # a rate for few parameters over one for all of a trained model
_NOT_TAKEN_OVER = ("retrain", "ladder", "along")  # sections of the model's run


@dataclass(frozen=True)
class Request:
    """What a person asks for: `keep` N of M blocks of `model`. None in the other fields for the usual values."""

    model: str
    store: str
    keep: tuple[int, int]
    name: str | None = None
    mask_steps: int | None = None
    train_steps: int | None = None
    assignments: Sequence[str] = ()


@dataclass(frozen=True)
class Pruning:
    """A pruning that can be planned or run, and the configurations of the model before and after the cut."""

    config: PipelineConfig
    version: Any  # that is pruned
    before: ModelConfig
    after: ModelConfig

    @property
    def name(self) -> str:
        """The candidate's."""
        (name,) = self.config.models
        return name


def prepare(catalog: Catalog, request: Request) -> Pruning:
    """The pruning of a registered version. Writes nothing.

    Raises UserError for a version that no run of edt trained, for a distilled one, and where no block can be left out.
    """
    version = find(catalog, request.model)
    record = record_of_version(catalog, version)
    own = str(version.name)
    run: PipelineConfig = validated(PipelineConfig, {**record.config, "store": request.store})
    trained = run.train_of(own)
    if trained.distill is not None:
        raise UserError(
            f"{own}/{version.version} was distilled, and the training after the cut, on images, would unlearn its few "
            "steps; prune its teacher, then distil the pruned version with `edt distill`"
        )
    if trained.trainable != "all" and not any(text.startswith("train.lr=") for text in request.assignments):
        raise UserError(
            f"{own}/{version.version} was trained with train.trainable {trained.trainable}, at a rate of "
            f"{trained.lr:g} for few parameters, but after the cut all are trained; set a rate for that, such as --set "
            f"train.lr={trained.lr / _FEW:g}"
        )
    before = replace(run.model_of(own, 2), num_classes=_classes(catalog, version))
    after = shallower(before, request.keep)
    values = kept_values(record, version, request.store)
    for section in _NOT_TAKEN_OVER:
        values.pop(section, None)
    values["train"] = recorded_fields(trained) | _recipe(trained, version, request, before, after)
    values["models"] = {request.name or own: {}}
    placed, uncut = _amm(run, before, after)
    values["sample"] = {**record.config["sample"], **placed}
    steps = request.mask_steps or max(1, trained.max_steps // MASK_SHARE)
    values["prune"] = {"keep": list(request.keep), "steps": steps, **uncut}
    values["name"] = f"{run.name}-pruned"
    for text in request.assignments:
        assign(values, *parse_assignment(text))
    config: PipelineConfig = validated(PipelineConfig, values)
    _check_settings(config, request, version)
    return Pruning(config, version, before, after)


def _check_settings(config: PipelineConfig, request: Request, version: Any) -> None:
    """Raise UserError for assignments that would prune in another way, or another model, than the request says."""
    if config.prune.keep != request.keep:
        raise UserError("prune.keep decides the depth of the model; set it with --keep, and not with --set prune.keep")
    if len(config.models) != 1:
        raise UserError(
            f"--set makes the models {', '.join(config.models) or 'none'}, but one model is pruned; give its name with "
            "--name"
        )
    (name,) = config.models
    location = config.train_of(name).init_from
    if location != f"models:/{version.name}/{version.version}":
        raise UserError(
            f"train.init_from is {location}, but {version.name}/{version.version} is pruned; name another version in "
            "its place, and leave --set train.init_from out"
        )


def _classes(catalog: Catalog, version: Any) -> int:
    """The number of classes of a version's model."""
    stored = named_model(f"{version.name}/{version.version}", "the model to prune", catalog.tracking_uri).model_config
    assert stored is not None, "of a registered version"
    return int(stored["num_classes"])


def _recipe(
    trained: TrainConfig, version: Any, request: Request, before: ModelConfig, after: ModelConfig
) -> dict[str, Any]:
    """The fields of `train` that a pruning changes."""
    steps = request.train_steps or max(1, trained.max_steps // SHARE)
    rate = trained.lr / SHARE
    return {
        "init_from": f"models:/{version.name}/{version.version}",
        "init_weights": "ema",
        "init_optimizer": "fresh",
        "trainable": "all",
        "model_overrides": overrides_record(after).get("model_overrides", {}),
        "amm_blocks": after.amm_blocks if before.amm_in_training else (),
        "max_steps": steps,
        "max_epochs": None,
        "max_hours": None,
        "lr": rate,
        "lr_final": min(trained.lr_final, rate),
        "warmup_steps": min(trained.warmup_steps, steps // 4),
        "keep_every": None,
        "patience": None,
        "seeds": (),
        "seed": trained.seed,
    }


def _amm(run: PipelineConfig, before: ModelConfig, after: ModelConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The placement of AMM in the protocol after the cut, and the one before it, where they differ.

    Block numbers, and those of a published placement, move with their place; parts of a model have their names.
    """
    chain = run.sample
    if isinstance(chain.amm_blocks, str) and chain.amm_blocks != "paper":
        return {}, {}
    numbers = chosen_amm_blocks(before, chain.amm_blocks, chain.cfg_scale)
    if not numbers:
        return {}, {}
    return {"amm_blocks": moved_blocks(before, after, numbers)}, {"uncut_amm_blocks": numbers}
