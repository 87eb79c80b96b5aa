"""sweep: a grid of sampling settings, such as `cfg=1,1.5,2 amm=off,paper`, with a table and a plot of its results."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import yaml

from edt_core.config import SampleConfig
from edt_core.errors import UserError
from edt_core.files.yaml_text import parse_yaml
from jobs.commands.options import validated

if TYPE_CHECKING:
    from edt_core.models import ModelConfig

_SHORT = {
    "cfg": "cfg_scale",
    "amm": "amm_blocks",
    "radius": "amm_radius",
    "rows": "amm_radius_rows",
    "kernel": "amm_kernel",
    "steps": "num_sampling_steps",
    "channels": "guidance_channels",
    "interval": "guidance_interval",
}
_CACHE = ("kind", "interval", "order", "warmup")  # parts of a value of the axis `cache`, joined by `-`
EMA = "ema"  # an axis beside those of SampleConfig: the width of the averaged weights
_OFF: dict[str, Any] = {"amm_blocks": (), "guidance_interval": None, "guidance_channels": None, "cache": None}
_PANELS_A_ROW = 3


@dataclass(frozen=True)
class Axis:
    """One field of the grid: its name and values as typed, and the field and values they mean."""

    name: str
    field: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One point of the grid: the value of each axis as typed, the configuration, and the width of the averaged weights.

    A width of None means the weights that the training registers.
    """

    settings: Mapping[str, str]
    config: SampleConfig
    ema: float | None = None


@dataclass(frozen=True)
class Result:
    """The result of a point of the grid."""

    settings: Mapping[str, str]
    metrics: Mapping[str, float]
    protocol: Mapping[str, Any]


def parse_axis(text: str) -> Axis:
    """`name=value,value,...`; off or none means no modulation, interval, limit of channels or width. Raises UserError.

    Blocks are joined by `+` (amm=7+10), the ends of an interval by `-` (interval=200-800), and so are the kind, the
    interval, the order and the warmup of a cache (cache=off,taylor-3,newton-4-2).
    """
    name, separator, listed = text.partition("=")
    field = _SHORT.get(name, name)
    if not separator or not listed or (field != EMA and field not in SampleConfig.model_fields):
        names = ", ".join([*_SHORT, EMA, *sorted(set(SampleConfig.model_fields) - set(_SHORT.values()))])
        raise UserError(f"--sweep takes NAME=VALUE,VALUE, such as cfg=1,1.5,2; got {text!r}; names: {names}")
    texts = tuple(part.strip() for part in listed.split(","))
    if len(set(texts)) != len(texts):
        raise UserError(f"--sweep {text}: a value is repeated")
    try:
        return Axis(name, field, texts, tuple(_value(field, part) for part in texts))
    except yaml.YAMLError as error:
        raise UserError(f"--sweep {text}: a value is invalid ({str(error).splitlines()[0]})") from error


def _value(field: str, text: str) -> Any:
    if text in ("off", "none", "all"):
        return _OFF.get(field)
    if field == EMA:
        return _width(text)
    if field == "amm_blocks" and text[:1].isdigit():
        return tuple(parse_yaml(part) for part in text.split("+"))
    if field == "cache":
        return dict(zip(_CACHE, (parse_yaml(part) for part in text.split("-")), strict=False))
    if field == "guidance_interval":
        return tuple(parse_yaml(part) for part in text.split("-"))
    return parse_yaml(text)


def _width(text: str) -> float:
    number = _number(text)
    if number is None:
        raise UserError(f"--sweep {EMA}={text}: a width is a number such as 0.08, or off for the registered average")
    return number


def grid(base: SampleConfig, axes: Sequence[Axis]) -> Iterator[Point]:
    """Every point of the grid, the last axis fastest. Raises UserError for invalid settings."""
    fields = [axis.field for axis in axes]
    if len(set(fields)) != len(fields):
        raise UserError(f"--sweep names a field twice: {', '.join(fields)}")
    for indices in product(*(range(len(axis.texts)) for axis in axes)):
        pairs = list(zip(axes, indices, strict=True))
        update = {axis.field: axis.values[index] for axis, index in pairs}
        width = update.pop(EMA, None)
        config = validated(SampleConfig, {**base.model_dump(), **update})
        yield Point({axis.name: axis.texts[index] for axis, index in pairs}, config, width)


def check_settings(points: Sequence[Point], model: "ModelConfig") -> None:
    """Raise UserError for settings that a model does not support, and for two values of an axis with the same effect.

    Examples: 'paper' if no placement of AMM is published; `amm=off,model` for a model without a placement.
    """
    effects = [{**dict(effective(point.config, model)), EMA: point.ema} for point in points]
    for name in points[0].settings:
        by_value: dict[str, list[dict[str, Any]]] = {}  # for each value, the other axes are in the same order
        for point, effect in zip(points, effects, strict=True):
            by_value.setdefault(point.settings[name], []).append(effect)
        for (first, its), (second, others) in combinations(by_value.items(), 2):
            if its == others:
                field = _SHORT.get(name, name)
                raise UserError(
                    f"--sweep {name}={first},{second}: both have the same effect on {model.name} "
                    f"({field} {_plain(its[0][field])}), so the sweep would compare a setting with itself. "
                    "Leave one of them out, or change the settings that make them equal."
                )


def repeated_settings(points: Sequence[Point], model: "ModelConfig") -> list[str]:
    """A sentence for each point of the grid that has the same effect as an earlier one."""
    first_with: dict[str, Point] = {}
    notes = []
    for point in points:
        first = first_with.setdefault(f"{point.ema} {effective(point.config, model).model_dump_json()}", point)
        if first is not point:
            notes.append(f"{_named(point)} has the same effect as {_named(first)}.")
    return notes


def effective(config: SampleConfig, model: "ModelConfig") -> SampleConfig:
    """The configuration with AMM resolved for a model, and with fields that have no effect set to null.

    Raises UserError for 'paper' if no placement is published, and for blocks that the model does not have.
    """
    from edt_core.models.positions import PAPER_ROWS
    from edt_core.sampling.sampler import resolved_amm_blocks, resolved_amm_radius

    blocks = tuple(sorted(set(resolved_amm_blocks(config, model))))
    replace(model, amm_blocks=blocks)  # raises for blocks that the model does not have
    radius, rows = resolved_amm_radius(config, model)
    update: dict[str, Any] = {"amm_blocks": blocks, "amm_radius": None, "amm_radius_rows": None, "amm_kernel": None}
    if blocks:
        rows = None if rows == PAPER_ROWS else rows  # the same radius
        kernel = config.amm_kernel or model.amm_kernel
        update |= {"amm_radius": radius, "amm_radius_rows": rows, "amm_kernel": kernel}
    if config.cfg_scale == 1.0:
        update |= {"cfg_power": None, "guidance_channels": None, "guidance_interval": None}
    return config.model_copy(update=update)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _named(point: Point) -> str:
    return " ".join(f"{name}={text}" for name, text in point.settings.items())


def shown_metrics(results: Sequence[Result]) -> list[str]:
    """Names of the metrics in order, without their standard deviations."""
    from edt_core.evaluation.metrics import in_order

    names = in_order({name for result in results for name in result.metrics})
    return [name for name in names if not (name.endswith("_std") and name.removesuffix("_std") in names)]


def results_table(results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """A Markdown table with one row per point of the grid, then the protocol fields that differ, then the notes."""
    from edt_core.evaluation.protocol import protocol_differences

    axes, metrics = list(results[0].settings), shown_metrics(results)
    lines = [_row([*axes, *metrics]), _row(["---"] * (len(axes) + len(metrics)))]
    for result in results:
        lines.append(_row([*result.settings.values(), *(_shown(result.metrics, name) for name in metrics)]))
    others = dict.fromkeys(
        difference.split(" ")[0]
        for result in results[1:]
        for difference in protocol_differences(results[0].protocol, result.protocol)
    )
    note = (
        f"The rows have the same protocol except for {', '.join(sorted(others))}."
        if others
        else "All rows have the same protocol."
    )
    return "\n".join([*lines, "", note, *notes])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    spread = metrics.get(f"{name}_std")
    return f"{metrics[name]:.4g}" if spread is None else f"{metrics[name]:.4g} ± {spread:.2g}"


def plot(results: Sequence[Result]) -> bytes:
    """A PNG with one panel per metric: the first numeric axis across, one line for each setting of the others."""
    from matplotlib.figure import Figure

    axes = list(results[0].settings)
    across = next((name for name in axes if all(_number(r.settings[name]) is not None for r in results)), axes[0])
    others = [name for name in axes if name != across]
    places = list(dict.fromkeys(result.settings[across] for result in results))
    numbers = [_number(place) for place in places]
    x = dict(zip(places, numbers if None not in numbers else range(len(places)), strict=True))
    lines: dict[str, list[Result]] = {}
    for result in results:
        lines.setdefault(", ".join(f"{name} {result.settings[name]}" for name in others), []).append(result)
    metrics = shown_metrics(results)
    columns = min(_PANELS_A_ROW, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for place, (metric, panel) in enumerate(zip(metrics, panels, strict=False)):  # the last row may not be full
        for label, line in lines.items():
            entries = [result for result in line if metric in result.metrics]
            panel.errorbar(
                [x[result.settings[across]] for result in entries],
                [result.metrics[metric] for result in entries],
                yerr=[result.metrics.get(f"{metric}_std", 0.0) for result in entries],
                marker="o",
                capsize=2,
                label=label,
            )
        panel.set_title(metric, fontsize=10)
        panel.set_xlabel(across)
        panel.set_xticks(list(x.values()), places)
        panel.grid(alpha=0.3)
        if place == 0 and others:
            panel.legend(fontsize=8)
    for panel in figure.axes[len(metrics) :]:
        panel.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
