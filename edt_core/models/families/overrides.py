"""Fields of a named model's configuration that a training sets: `train.model_overrides`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from edt_core.errors import UserError
from edt_core.models.config import ModelConfig
from edt_core.models.families.family import Family


def checked_overrides(family: Family, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides with values of the fields' types: lists from YAML become tuples.

    Args:
        family: the family of the model.
        name: its name, for messages.
        overrides: fields of the family's configuration, as in a YAML file.

    Raises:
        UserError: a field that the family does not have, or a value of another type.
    """
    known = family.overridable
    if unknown := [field for field in overrides if field not in known]:
        has = f"takes {', '.join(known)}" if known else "takes none"
        raise UserError(
            f"model_overrides has {', '.join(unknown)} for {name}, but a model of {family.title} {has}; leave the "
            "others out (model_overrides={} for none)"
        )
    if not overrides:
        return {}
    hints = get_type_hints(family.config)
    return {field: _value(name, field, hints[field], value) for field, value in overrides.items()}


def overrides_of(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The overridable fields of a configuration that differ from those of the named model, as plain values for JSON.

    Empty for a name that the family does not have.
    """
    if config.name not in family.sizes:
        return {}
    numbers = family.sizes[config.name].numbers
    own = {field.name: numbers.get(field.name, field.default) for field in fields(family.config)}
    now = {name: getattr(config, name) for name in family.overridable}
    return {name: _plain(value) for name, value in now.items() if value != own[name]}


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _value(name: str, field: str, kind: Any, value: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f"model_overrides.{field} of {name} is {value!r}: {problem[:1].lower()}{problem[1:]}") from None
