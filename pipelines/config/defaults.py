"""Defaults of a pipeline's fields that depend on the objectives of its models."""

from collections.abc import Mapping
from typing import Any

from edt_core.config import TrainConfig
from edt_core.diffusion import OBJECTIVES, only_objective, train_defaults


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The raw values of a configuration, with the defaults of its objectives that differ from the schema's.

    A model whose family has only one objective has it, unless the model's own fields name another. The sampler, and
    what else of the chain an objective sets, is set if it is the same for all models.
    """
    train, models, sample, along = (values.get(name) or {} for name in ("train", "models", "sample", "along"))
    if not all(isinstance(section, dict) for section in (train, models, sample, along, *models.values())):
        return values  # invalid, which the fields report
    given, shared = set(train), train.get("objective")
    models = {name: {**_only(fields, train), **fields} for name, fields in models.items()}
    train = {**train_defaults({"objective": shared}), **train}
    usual = {field: TrainConfig.model_fields[field].default for field in train.keys() - given}
    models = {
        name: {**_without({**usual, **train_defaults(fields)}, given), **fields}
        if fields.get("objective", shared) != shared
        else fields
        for name, fields in models.items()
    }
    objectives = [OBJECTIVES.get(str(fields.get("objective", shared))) for fields in models.values()]
    chains = [objective.usual_chain for objective in objectives if objective is not None]
    if chains and None not in objectives and all(chain == chains[0] for chain in chains):
        default = chains[0]
        sample, along = {**default, **sample}, {**default, **along} if along else along
    sections = {"train": train, "models": models, "sample": sample, "along": along}
    return {**values, **{name: section for name, section in sections.items() if section or name in values}}


def _only(fields: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    """The objective of a model that can have no other, unless one is named where the model is."""
    beside = fields if "model" in fields else {**train, **fields}
    only = only_objective(beside.get("model"))
    return {} if only is None or "objective" in beside else {"objective": only}


def _without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
