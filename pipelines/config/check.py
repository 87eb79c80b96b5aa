"""All problems of a configuration at once, each with its line in the file and a suggested field."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from edt_core.errors import UserError
from edt_core.files.small_files import MAX_CONFIG_BYTES, read_text
from edt_core.files.yaml_text import compose_yaml, parse_yaml
from edt_core.printing.redaction import redacted
from jobs.commands.options import is_section, meant_by, validated
from pipelines.config.schema import PipelineConfig, load_config
from pipelines.config.size_check import size_problems

_MAX_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Problem:
    """One problem. `field` is "" if several fields are involved; `line` is None if the value is not in the file."""

    config: str
    field: str
    value: str | None
    problem: str
    meant: tuple[str, ...] = ()
    line: int | None = None

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        field = f"{self.field} = {self.value}: " if self.field and self.value is not None else self.field
        message = f"{place}{field}{': ' if field and self.value is None else ''}{self.problem}"
        return f"{message}; did you mean {' or '.join(self.meant)}?" if self.meant else message

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def problems(name_or_path: str, assignments: Sequence[str] = ()) -> list[Problem]:
    """Every problem of a configuration; empty if it is valid.

    Sizes are checked against each other, for each model, once every single field is valid.
    """
    try:
        config = load_config(name_or_path, assignments)
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, ValidationError):
            return [Problem(name_or_path, "", None, str(error))]
        return _located(_problems_of(name_or_path, cause))
    return [Problem(name_or_path, "", None, text) for text in size_problems(config)]


def _problems_of(name: str, error: ValidationError) -> list[Problem]:
    errors = error.errors()
    whole = [entry for entry in errors if not entry["loc"]]
    if whole and isinstance(whole[0]["input"], Mapping):  # pydantic stops at the first model with a problem
        between = [entry["msg"].removeprefix("Value error, ") for entry in whole]
        return [Problem(name, "", None, text) for text in _of_each_model(whole[0]["input"]) or between]
    by_field: dict[str, list[Any]] = {}
    for entry in errors:
        by_field.setdefault(_field_of(entry["loc"]), []).append(entry)
    return [_problem(name, field, entries) for field, entries in by_field.items()]


def _of_each_model(values: Mapping[str, Any]) -> list[str]:
    """Problems between fields, each listed once even if several models have it."""
    messages: dict[str, None] = {}
    for model, fields in values["models"].items():
        try:
            validated(PipelineConfig, {**values, "models": {model: fields}})
        except UserError as error:
            messages |= dict.fromkeys(str(error).splitlines())
    return list(messages)


def _problem(name: str, field: str, entries: Sequence[Any]) -> Problem:
    first = entries[0]
    if first["type"] == "missing":
        return Problem(name, field, None, "required, but missing")
    value = redacted(repr(first["input"]))
    value = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
    if first["type"] == "extra_forbidden":
        return Problem(name, field, value, "unknown field", meant_by(field, PipelineConfig))
    messages = dict.fromkeys(redacted(entry["msg"]).removeprefix("Value error, ") for entry in entries)
    return Problem(name, field, value, ", or: ".join(messages))


def _field_of(location: Sequence[Any]) -> str:
    """The dotted name of the field of an error, without the branches of a union that pydantic tried."""
    parts: list[str] = []
    schema: Any = PipelineConfig
    for part in location:
        parts.append(str(part))
        field = schema.model_fields.get(str(part))
        if field is None or not is_section(field.annotation):
            break
        schema = field.annotation
    return ".".join(parts)


def _located(unplaced: list[Problem]) -> list[Problem]:
    """The same problems with their lines in the file. A value from `--set` or a base has no line."""
    path = Path(unplaced[0].config)
    if not path.is_file():
        return unplaced
    root = compose_yaml(read_text(path, MAX_CONFIG_BYTES))
    located = [replace(problem, line=_line(root, problem)) for problem in unplaced]
    return sorted(located, key=lambda problem: (problem.line is None, problem.line))


def _line(root: yaml.Node | None, problem: Problem) -> int | None:
    """The line of a field, counted from 1."""
    node, line = root, None
    for part in problem.field.split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        pair = next(((key, value) for key, value in pairs if key.value == part), None)
        if pair is None:
            return None
        line, node = pair[0].start_mark.line + 1, pair[1]
    if not isinstance(node, yaml.ScalarNode) or problem.value is None:
        return line
    written = redacted(repr(parse_yaml(node.value or "null")))
    return line if written == problem.value else None  # otherwise --set replaces it
