"""The protocol of a result: everything that must be equal for two values to be comparable.

A protocol is a mapping of fields, possibly nested, with values of JSON types.
"""

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

UINT8_RULE = "floor(127.5 x + 128), clamped to 0..255"  # of an image x in -1..1; unbiased, unlike 255 (x + 1) / 2
_NOT_STATED = "(not stated)"
_ABSENT = object()


def protocol_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The fields in which two protocols differ, with both values: "cfg_scale 1.5 / 2.0", "sampler.name a / b".

    Empty if they are equal. A missing field differs from every value, also from null.
    """
    return [f"{name} {' / '.join(texts)}" for name, texts in _differences([first, second])]


def same_protocol(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether values measured by the two protocols are comparable."""
    return not protocol_differences(first, second)


def comparison_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table with a column for each result and a row for each metric, and whether the columns are comparable.

    results: name -> {"metrics": {name: value}, "protocol": {...}}. A metric with a "<metric>_std" is shown as
    "4.21 ± 0.03". Below the table is one line for each field in which protocols differ, with all its values.
    """
    metrics = {name: result.get("metrics", {}) for name, result in results.items()}
    measured = dict.fromkeys(metric for values in metrics.values() for metric in values)
    rows = [metric for metric in measured if metric.removesuffix("_std") not in measured.keys() - {metric}]
    lines = [_row("metric", *results), "|---" * (len(results) + 1) + "|"]
    lines += [_row(metric, *(_cell(values, metric) for values in metrics.values())) for metric in rows]
    return "\n".join([*lines, "", *_comparability(results)])


def _comparability(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines below the table."""
    protocols = {name: result.get("protocol") or {} for name, result in results.items()}
    unstated = [name for name, protocol in protocols.items() if not protocol]
    differing = list(_differences(list(protocols.values())))
    if unstated:
        yield f"No protocol is stated for {', '.join(unstated)}: these values may not be comparable with others."
    elif not differing:
        yield "All measured by one protocol."
    if differing:
        yield f"**Not comparable**: measured by different protocols ({' / '.join(protocols)}):"
        yield from (f"- {name}: {' / '.join(texts)}" for name, texts in differing)


def _differences(protocols: list[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Each field that is not equal in all protocols, with its text in each."""
    flat = [dict(_flat_fields(protocol)) for protocol in protocols]
    for name in dict.fromkeys(name for fields in flat for name in fields):
        values = [fields.get(name, _ABSENT) for fields in flat]
        if not all(_equal(values[0], value) for value in values[1:]):
            yield name, [_NOT_STATED if value is _ABSENT else _text(value) for value in values]


def _flat_fields(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields with dotted names; an empty mapping is a value."""
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat_fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _equal(first: Any, second: Any) -> bool:
    """Whether two values are equal in JSON: a tuple equals a list, and 1 equals 1.0, but true does not equal 1."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, bool) is not isinstance(second, bool):
        return False
    return bool(first == second)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cell(values: Mapping[str, float], metric: str) -> str:
    """A value with four significant digits, and its spread with the same decimals and at least one digit."""
    value, spread = values.get(metric), values.get(f"{metric}_std")
    if value is None:
        return "-"
    if spread is None:
        return _number(value, _decimals(value, 4))
    decimals = max(_decimals(value, 4), _decimals(spread, 1))
    return f"{_number(value, decimals)} ± {_number(spread, decimals)}"


def _decimals(value: float, digits: int) -> int:
    """Number of decimals that show a value with `digits` significant digits, without trailing zeros."""
    if not math.isfinite(value):
        return 0
    exponent = Decimal(f"{value:.{digits - 1}e}").normalize().as_tuple().exponent
    return max(0, -int(exponent))


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
