"""The pipelines of a table: rows that are sampled alike share one, so that their trainings run side by side."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from edt_core.errors import UserError
from jobs.commands.options import parse_assignment, validated
from pipelines.config.schema import PipelineConfig, assign
from pipelines.studies.paper.table import Row, Scale, Table, base_values, stem_of

MOST_TRAININGS = 8  # of one pipeline: each waiting step is a process of some hundred megabytes


def registered_name(row: str, scale: Scale) -> str:
    """The name in the registry of a row's model. Rows of several tables with one name are one model."""
    return f"paper-{scale}-{row}"


def pipelines_of(
    table: Table, name: str, scale: Scale, assignments: Sequence[str] = (), store: str | None = None
) -> list[PipelineConfig]:
    """The pipelines that train and measure the rows of a table, in order.

    A training with the fields of an earlier one is reused, also one of another table. Raises UserError for assignments
    that do not fit.
    """
    _check_assignments(table, name, scale, assignments)
    groups: dict[str, dict[str, Row]] = {}
    for row_name, row in table.rows_at(scale).items():
        groups.setdefault(json.dumps(row.sample_at(scale), sort_keys=True), {})[row_name] = row
    configs = []
    for rows in groups.values():
        values = _values(table, name, scale, rows)
        for text in assignments:
            assign(values, *parse_assignment(text))
        if store is not None:
            values["store"] = store
        config: PipelineConfig = validated(PipelineConfig, values)
        configs += _divided(config)
    return configs


def _check_assignments(table: Table, name: str, scale: Scale, assignments: Sequence[str]) -> None:
    """Raise UserError for assignments of what the rows are about: their labels would not be true any more."""
    rows = table.rows_at(scale).values()
    train = {"model", *table.train, *(field for row in rows for field in row.train_at(scale))}
    sample = {*table.sample, *(field for row in rows for field in row.sample_at(scale))}
    fields = {"models", *(f"train.{field}" for field in train), *(f"sample.{field}" for field in sample)}
    for text in assignments:
        key = parse_assignment(text)[0]
        if key in ("train", "sample") or any(key == field or key.startswith(f"{field}.") for field in fields):
            raise UserError(
                f"--set {key}: the rows of table {name} are about this field, so their labels would be wrong; set "
                "another field, or write a configuration of your own"
            )


def _values(table: Table, name: str, scale: Scale, rows: Mapping[str, Row]) -> dict[str, Any]:
    """The raw values of the pipeline of some rows that are sampled alike."""
    chain = {**table.sample, **next(iter(rows.values())).sample_at(scale)}
    values = _merged(base_values(scale), {"train": table.train, "sample": chain})
    values = _merged(values, table.pipeline.get(scale, {}))
    if "along" in values:
        values["along"] |= chain
    if scale == "full":
        values = _merged(values, {"preprocess": {"image_size": table.image_size}})
    values["name"] = f"paper-{scale}-{stem_of(name)}"
    values["models"] = {
        registered_name(row_name, scale): {"model": row.model_at(scale), **row.train_at(scale)}
        for row_name, row in rows.items()
    }
    return values


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with changes on top, section by section."""
    merged = deepcopy(dict(base))
    for section, fields in changes.items():
        is_section = isinstance(fields, Mapping) and isinstance(merged.get(section), Mapping)
        merged[section] = {**merged[section], **fields} if is_section else deepcopy(fields)
    return merged


def _divided(config: PipelineConfig) -> list[PipelineConfig]:
    """The pipeline in parts of at most MOST_TRAININGS trainings, a model at least."""
    parts: list[dict[str, dict[str, Any]]] = []
    room = 0
    for model, fields in config.models.items():
        trainings = len(config.trainings_of(model))
        if not parts or trainings > room:
            parts.append({})
            room = MOST_TRAININGS
        parts[-1][model] = fields
        room -= trainings
    return [config.model_copy(update={"models": models}) for models in parts]
