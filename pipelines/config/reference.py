"""Generate docs/config.md from the schemas: `python -m pipelines.config.reference > docs/config.md`."""

import json
import types
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from edt_core.config import Section
from edt_core.printing.console import say
from pipelines.config.schema import PipelineConfig

_INTRODUCTION = """\
# Configuration
Generated from the schemas by `python -m pipelines.config.reference > docs/config.md`; a test fails if the two differ.
Do not edit it.

A configuration is a YAML file with these sections. `edt run` takes its path, or its name if it ships with the package.
Omitted fields have their defaults. `base: NAME_OR_PATH` starts from another configuration: the fields of the file
replace those of the base section by section, but `models` as a whole. On the command line, `--set train.lr=0.001` sets
one field; `edt train` and the other verbs take the fields of their section as options (`--lr 0.001`). Unknown fields
are errors.

*Result* shows whether a change leads to another artifact. "no" marks a field that only says how a step runs or where
something is: it is not part of the fingerprint, and existing artifacts are reused. Of `source` and of published weights
only the content counts, not the location.
"""

# Units of numbers by field name. The first matching pattern applies.
_UNITS = (
    ("image_size", "pixels"),
    ("*hours", "hours"),
    ("*_s", "seconds"),
    ("max_epochs", "epochs"),
    ("*_bytes", "bytes"),
    ("num_timesteps", "timesteps"),
    ("*steps", "steps"),
    ("every", "steps"),
    ("interval", "steps"),
    ("warmup", "steps"),
    ("*_every", "steps"),
    ("patience", "evaluations"),
    ("*batch_size", "samples"),
    ("guidance_interval", "timesteps, or times in 0..1"),
    ("amm_radius", "tokens"),
    ("amm_radius_rows", "squared tokens"),
    ("align_*block", "blocks"),
    ("num_cpus*", "CPUs"),
    ("num_gpus*", "GPUs"),
    ("*_images", "images"),
    ("images_per_shard", "images"),
    ("limit", "images"),
    ("num_samples", "samples"),
    ("unit_size", "samples"),
    ("shuffle_buffer", "samples"),
    ("shuffle_block", "shards"),
    ("keep_features", "features"),
    ("pairwise_limit", "features"),
    ("*_channels", "channels"),
    ("feature_dim", "dimensions"),
    ("num_workers", "processes"),
    ("num_decode_threads", "threads"),
    ("num_to_keep", "checkpoints"),
    ("ema_snapshots", "snapshots"),
    ("budgets", "FLOPs"),
    ("resamples", "samples of the bootstrap"),
    ("ema_widths", "share of the steps"),
)
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "a multiple of"))
_SHOWN_BELOW = 1 << 31  # a bound at the end of an integer's range is not worth showing


def reference() -> str:
    """The whole page, as Markdown."""
    own = [(name, info) for name, info in PipelineConfig.model_fields.items() if _section(info) is None]
    parts = [_INTRODUCTION, "## The pipeline\n" + _table(own)]
    for name, section in _sections():
        summary = (section.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("  ", " ")
        parts.append(f"## {name}\n{summary}\n\n{_table(list(section.model_fields.items()))}")
    return "\n".join(parts)


def unit_of(name: str) -> str | None:
    """The unit of a field of this name; None for a pure number or another type."""
    return next((unit for pattern, unit in _UNITS if fnmatchcase(name, pattern)), None)


def _sections() -> Iterator[tuple[str, type[Section]]]:
    """The sections of a pipeline by name, and after those by name the sections within their fields: `sample.cache`."""
    inner: dict[str, type[Section]] = {}
    for name, info in PipelineConfig.model_fields.items():
        if (section := _section(info)) is not None:
            yield name, section
            for field, within in section.model_fields.items():
                inner.update((field, kind) for kind in get_args(within.annotation) if _is_section(kind))
    yield from sorted(inner.items())


def _section(info: FieldInfo) -> type[Section] | None:
    return info.annotation if _is_section(info.annotation) else None


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _table(fields: list[tuple[str, FieldInfo]]) -> str:
    rows = [("field", "type", "default", "unit", "result", "description")]
    rows += [(f"`{name}`", *_cells(name, info)) for name, info in fields]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _cells(name: str, info: FieldInfo) -> tuple[str, str, str, str, str]:
    kind = _kind(info.annotation)
    unit = (unit_of(name) or "") if "number" in kind or "integer" in kind else ""
    in_result = "no" if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("runtime") else "yes"
    nothing = " or `null`" if kind.endswith(" or `null`") else ""
    text = kind.removesuffix(nothing) + _bounds(info) + nothing
    return text, _default(info), unit, in_result, info.description or ""


def _kind(annotation: Any) -> str:
    """A type in words, as its values are written in YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(kind) for kind in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        of = _kind(inner[0])
        return f"list of ({of})" if "," in of else f"list of {of}"
    if origin is tuple:
        return f"[{', '.join(_kind(kind) for kind in inner)}]"
    if origin is dict:
        return f"mapping of {_kind(inner[0])} to {_kind(inner[1])}"
    if _is_section(annotation):
        return "mapping of the fields below"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`", Any: "value"}
    return names[annotation]


def _bounds(info: FieldInfo) -> str:
    bounds = {word: getattr(rule, key, None) for rule in info.metadata for key, word in _BOUNDS if hasattr(rule, key)}
    texts = [f"{word} {value:g}" for word, value in bounds.items() if value is not None and abs(value) < _SHOWN_BELOW]
    return f" {', '.join(texts)}" if texts else ""


def _default(info: FieldInfo) -> str:
    return "required" if info.default is PydanticUndefined else f"`{json.dumps(info.default)}`"


if __name__ == "__main__":
    say(reference(), nl=False)
