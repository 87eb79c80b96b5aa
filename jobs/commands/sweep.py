"""sweep: a grid of sampling settings, as `cfg=1,1.5,2 amm=off,paper`, and its results as a table and a plot."""

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
    "kernel": "amm_kernel",
    "steps": "num_sampling_steps",
    "channels": "guidance_channels",
    "interval": "guidance_interval",
}
_OFF: dict[str, Any] = {"amm_blocks": (), "guidance_interval": None, "guidance_channels": None}
_PANELS_A_ROW = 3


@dataclass(frozen=True)
class Axis:
    """One field of the grid: its name and values as they were given, and the field and values they mean."""

    name: str
    field: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One place of the grid: what was given for each axis, and the configuration there."""

    settings: Mapping[str, str]
    config: SampleConfig


@dataclass(frozen=True)
class Result:
    """What a place of the grid gave."""

    settings: Mapping[str, str]
    metrics: Mapping[str, float]
    protocol: Mapping[str, Any]


def parse_axis(text: str) -> Axis:
    """`name=value,value,...`; off or none for no modulation, interval or limit of channels. Raises UserError.

    Blocks are joined by `+` (amm=7+10), the ends of an interval by `-` (interval=200-800).
    """
    name, separator, listed = text.partition("=")
    field = _SHORT.get(name, name)
    if not separator or not listed or field not in SampleConfig.model_fields:
        known = ", ".join([*_SHORT, *sorted(set(SampleConfig.model_fields) - set(_SHORT.values()))])
        raise UserError(f"--sweep takes NAME=VALUE,VALUE, as cfg=1,1.5,2; got {text!r}; names: {known}")
    texts = tuple(part.strip() for part in listed.split(","))
    if len(set(texts)) != len(texts):
        raise UserError(f"--sweep {text}: a value stands there twice")
    try:
        return Axis(name, field, texts, tuple(_value(field, part) for part in texts))
    except yaml.YAMLError as error:
        raise UserError(f"--sweep {text}: a value is not understood ({str(error).splitlines()[0]})") from error


def _value(field: str, text: str) -> Any:
    if text in ("off", "none", "all"):
        return _OFF.get(field)
    if field == "amm_blocks" and text not in ("paper", "model"):
        return tuple(parse_yaml(part) for part in text.split("+"))
    if field == "guidance_interval":
        return tuple(parse_yaml(part) for part in text.split("-"))
    return parse_yaml(text)


def grid(base: SampleConfig, axes: Sequence[Axis]) -> Iterator[Point]:
    """Every place of the grid, the last axis fastest. Raises UserError for settings that do not make a protocol."""
    fields = [axis.field for axis in axes]
    if len(set(fields)) != len(fields):
        raise UserError(f"--sweep names a field twice: {', '.join(fields)}")
    for places in product(*(range(len(axis.texts)) for axis in axes)):
        chosen = list(zip(axes, places, strict=True))
        update = {axis.field: axis.values[place] for axis, place in chosen}
        config = validated(SampleConfig, {**base.model_dump(), **update})
        yield Point({axis.name: axis.texts[place] for axis, place in chosen}, config)


def check_settings(points: Sequence[Point], model: "ModelConfig") -> None:
    """Refuse settings that a model does not support, and two values of an axis that never differ in their effect.

    Raises UserError: 'paper' where no placement of AMM is published; `amm=off,model` of a model without a placement.
    """
    effects = [effective(point.config, model) for point in points]
    for name in points[0].settings:
        by_value: dict[str, list[SampleConfig]] = {}  # the others' values come in the same order for each value
        for point, effect in zip(points, effects, strict=True):
            by_value.setdefault(point.settings[name], []).append(effect)
        for (first, its), (second, others) in combinations(by_value.items(), 2):
            if its == others:
                field = _SHORT.get(name, name)
                raise UserError(
                    f"--sweep {name}={first},{second}: both have the same effect on {model.name} "
                    f"({field} {_plain(getattr(its[0], field))}), so the sweep would compare a setting with itself. "
                    "Leave one of them out, or change the settings that make them equal."
                )


def repeated_settings(points: Sequence[Point], model: "ModelConfig") -> list[str]:
    """A sentence for each place of the grid that has the effect of an earlier one."""
    first_with: dict[str, Point] = {}
    notes = []
    for point in points:
        first = first_with.setdefault(effective(point.config, model).model_dump_json(), point)
        if first is not point:
            notes.append(f"{_named(point)} has the same effect as {_named(first)}.")
    return notes


def effective(config: SampleConfig, model: "ModelConfig") -> SampleConfig:
    """The configuration with AMM resolved for a model, and with fields that have no effect set to null.

    Raises UserError for 'paper' where no placement is published, and for blocks that the model does not have.
    """
    from edt_core.sampling.sampler import resolved_amm_blocks

    blocks = tuple(sorted(set(resolved_amm_blocks(config, model))))
    replace(model, amm_blocks=blocks)  # refuses blocks that the model does not have
    radius = model.amm_radius if config.amm_blocks == "model" and config.amm_radius is None else config.amm_radius
    update: dict[str, Any] = {"amm_blocks": blocks, "amm_radius": None, "amm_kernel": None}
    if blocks:
        update |= {"amm_radius": radius, "amm_kernel": config.amm_kernel or model.amm_kernel}
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
    """A Markdown table, one row a place of the grid; below it what its rows do not have in common, and the notes."""
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
    note = f"The rows are of one protocol but for {', '.join(sorted(others))}." if others else "All of one protocol."
    return "\n".join([*lines, "", note, *notes])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    spread = metrics.get(f"{name}_std")
    return f"{metrics[name]:.4g}" if spread is None else f"{metrics[name]:.4g} ± {spread:.2g}"


def plot(results: Sequence[Result]) -> bytes:
    """A PNG with a panel a metric: the first axis of numbers across, one line for each setting of the others."""
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
            having = [result for result in line if metric in result.metrics]
            panel.errorbar(
                [x[result.settings[across]] for result in having],
                [result.metrics[metric] for result in having],
                yerr=[result.metrics.get(f"{metric}_std", 0.0) for result in having],
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
