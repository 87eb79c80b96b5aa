"""Defaults of a pipeline's fields that depend on the objectives of its models."""

from collections.abc import Mapping
from typing import Any

from edt_core.config import TrainConfig
from edt_core.diffusion import OBJECTIVES, train_defaults


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The raw values of a configuration, with the defaults of its objectives that differ from the schema's.

    The sampler is set if all models have the same one by default.
    """
    train, models, sample, along = (values.get(name) or {} for name in ("train", "models", "sample", "along"))
    if not all(isinstance(section, dict) for section in (train, models, sample, along, *models.values())):
        return values  # invalid, which the fields report
    given, shared = set(train), train.get("objective")
    train = {**train_defaults(shared), **train}
    usual = {field: TrainConfig.model_fields[field].default for field in train.keys() - given}
    models = {
        name: {**_without({**usual, **train_defaults(fields["objective"])}, given), **fields}
        if fields.get("objective", shared) != shared
        else fields
        for name, fields in models.items()
    }
    objectives = [OBJECTIVES.get(str(fields.get("objective", shared))) for fields in models.values()]
    samplers = {objective.samplers[0] for objective in objectives if objective is not None}
    if len(samplers) == 1 and None not in objectives:
        default = {"sampler": samplers.pop()}
        sample, along = {**default, **sample}, {**default, **along} if along else along
    sections = {"train": train, "models": models, "sample": sample, "along": along}
    return {**values, **{name: section for name, section in sections.items() if section or name in values}}


def _without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
