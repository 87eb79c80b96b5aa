"""report: one self-contained HTML page about a registered model.

Pure rendering: equal data gives equal bytes, and the page loads nothing from other addresses.
Shapes: N images, S image size, T timesteps; images are uint8 RGB [N, S, S, 3] with labels int [N], indices into
`classes`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.evaluation.metrics.registry import REGISTRY
from edt_core.evaluation.trainings import spread_text
from edt_core.evaluation.worth import Measured, Remark, difference
from edt_core.sampling.grid import PIXELATED_UP_TO, encodable
from edt_core.training.validation.overfitting import HELD_OUT_LOSS
from pipelines.report.along import AlongView
from pipelines.report.costs import StepCost
from pipelines.report.figures import Picture, champion_trend, timestep_curves, training_curves
from pipelines.report.history import VersionRecord
from pipelines.report.images import Origin, display_size, gallery, neighbour_view
from pipelines.report.inputs import Neighbourhood
from pipelines.report.lineage import LineageRow, lineage_graph
from pipelines.report.predecessor import Predecessor
from pipelines.report.teacher import TeacherFacts
from pipelines.report.validation import Validation, validation_view

NOTHING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
TIMES, DIVIDED = "\N{MULTIPLICATION SIGN}", "\N{DIVISION SIGN}"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class ReportData:
    """The data of a report. `model`, `protocol` and `environment` may have any keys and keep their order."""

    title: str
    config_name: str
    model: Mapping[str, Any]
    decision: str  # "<outcome>: <why>"
    classes: tuple[str, ...]
    samples: Array
    sample_labels: Array
    untrained: Array | None
    untrained_labels: Array | None
    real: Array
    real_labels: Array
    # step, and any of loss, loss_full, loss_masked, loss_t0.., lr, grad_norm, holdout_loss
    history: Sequence[Mapping[str, float]]
    metrics_before: Mapping[str, float] | None  # of the untrained model
    metrics_after: Mapping[str, float]
    protocol: Mapping[str, Any]
    lineage: Sequence[LineageRow]
    config_yaml: str
    environment: Mapping[str, str]
    protocol_differences: Sequence[str] = ()  # between the protocols of the untrained model and of this version
    registry: VersionRecord | None = None
    crowned: bool = False  # the version became champion
    neighbours: Neighbourhood | str = ""  # or why there are none
    final_losses: Array | None = None  # mean of the last losses at each timestep, [T]
    num_timesteps: int = 1000
    costs: Sequence[StepCost] = ()
    validation: Validation | None = None
    along: AlongView | None = None  # the evaluations along the training
    trainings: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # metrics by seed, if there are several
    measured: Measured | None = None  # the metrics with the number of samples; None if that is unknown
    remarks: Sequence[Remark] = ()  # on the metrics
    left_out: Sequence[str] = ()  # what of the source was not used
    predecessor: Predecessor | None = None  # the champion that this version was compared with
    teacher: TeacherFacts | None = None  # of a distilled version
    pruned: Mapping[str, str] = field(default_factory=dict)  # facts of a version whose blocks were cut


def render_report(data: ReportData) -> str:
    """The report as one HTML page: no script, no external address, everything inlined.

    Raises ValueError for images or labels of the wrong shape, for two lineage rows of one name, and for a cyclic
    lineage.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipelines", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, duration=duration, scaled=scaled, brief=brief)
    environment.tests["digest"] = lambda value: bool(re.fullmatch("[0-9a-f]{32,}", str(value)))
    image_size = data.samples.shape[1]
    neighbours = data.neighbours
    page = environment.get_template("report.html.j2").render(
        data=data,
        image_size=image_size,
        gallery=gallery(data.classes, _origins(data)),
        display_px=display_size(image_size),
        pixelated=image_size <= PIXELATED_UP_TO,
        metrics=compare_metrics(data.metrics_before or {}, data.metrics_after, data.measured),
        own_space="classifier" if any(name.endswith("_classifier") for name in data.metrics_after) else None,
        validation=None if data.validation is None else validation_view(data.validation),
        over_trainings=spread_text(data.trainings) if data.trainings else {},
        trend=_trend(data),
        neighbours=neighbour_view(neighbours, data.classes) if isinstance(neighbours, Neighbourhood) else None,
        curves=training_curves(data.history),
        held_out=any(HELD_OUT_LOSS in row for row in data.history),
        by_timestep=timestep_curves(data.history, data.final_losses, data.num_timesteps),
        graphs={
            "across": lineage_graph(data.lineage, data.title),
            "down": lineage_graph(data.lineage, data.title, True),
        },
        total_seconds=sum(cost.seconds for cost in data.costs),
        longest_seconds=max((cost.seconds for cost in data.costs), default=0.0),
    )
    return encodable(page)


def _origins(data: ReportData) -> list[Origin]:
    """Generated images first, then those of the champion before, real ones, and the untrained model's."""
    champion = data.predecessor
    has_champion = champion is not None and champion.samples is not None
    generated, real, untrained = ((5, 4), (3, 2), (2, 1)) if has_champion else ((7, 5), (4, 3), (3, 2))
    origins = [Origin("Generated", "generated images", data.samples, data.sample_labels, generated)]
    if champion is not None and champion.samples is not None and champion.labels is not None:
        heading, what = f"Version {champion.facts.version}", "images of the champion before"
        origins.append(Origin(heading, what, champion.samples, champion.labels, generated))
    origins.append(Origin("Real", "real images", data.real, data.real_labels, real))
    if data.untrained is not None and data.untrained_labels is not None and len(data.untrained):
        origins.append(
            Origin("Untrained", "images of the untrained model", data.untrained, data.untrained_labels, untrained)
        )
    return origins


def _trend(data: ReportData) -> Picture | None:
    """The figure of earlier champions; None if none of them, or not this version, has a value of the metric."""
    registry = data.registry
    value = data.metrics_after.get(registry.metric, math.nan) if registry else math.nan
    if registry is None or not math.isfinite(value) or all(c.value is None for c in registry.champions):
        return None
    spread, version = data.metrics_after.get(f"{registry.metric}_std"), str(data.model.get("version", ""))
    return champion_trend(registry.champions, version, value, spread, registry.metric, data.crowned)


# Text


def shown(value: Any) -> str:
    """A value for the page: digits in groups, at most four significant ones; lists joined."""
    if value is None or value == "" or (isinstance(value, list | tuple) and not value):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        value = float(value)
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return json.dumps(dict(value), ensure_ascii=False, default=str)
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value)
    return str(value)


def duration(seconds: float | None) -> str:
    """0.42 s, 38 s, 4 min 05 s, 2 h 07 min."""
    if seconds is None:
        return NOTHING
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def brief(value: float | None) -> str:
    """At most three significant digits: 0.253, 14, 1,930."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def scaled(value: float | None, unit: str) -> str:
    """A value with a unit prefix: 4.2e12, "FLOP" -> 4.2 TFLOP."""
    if value is None:
        return NOTHING
    step = 0 if value < 1 else min(int(math.log10(value) // 3), len(_PREFIXES) - 1)
    return f"{value / 1000**step:.3g} {_PREFIXES[step]}{unit}"


# Metrics


@dataclass(frozen=True)
class MetricRow:
    """One metric, untrained and trained. verdict: better, worse, same, noise (it may be), or "" if it is unknown.

    spread: standard deviation of `after`, or None.
    """

    name: str
    meaning: str
    lower_is_better: bool | None
    before: float | None
    after: float | None
    change: str
    verdict: str
    spread: float | None = None


# prefix of the name -> (what it measures, whether lower is better)
_METRIC_MEANINGS = (
    *((metric.name, metric.meaning, metric.lower_is_better) for metric in REGISTRY.values()),
    ("fd_", "Fréchet distance between generated and real features", True),
    ("accuracy", "share of generated images classified as the requested class", False),
)


def compare_metrics(
    before: Mapping[str, float], after: Mapping[str, float], measured: Measured | None = None
) -> list[MetricRow]:
    """A row for every metric of `after`, then for those only in `before`, each with its factor of change.

    `measured`: `after` with the number of samples; then a change that may be noise has the verdict "noise".
    """
    rows = []
    for name in dict.fromkeys((*after, *before)):
        if name.endswith("_std") and name.removesuffix("_std") in after:
            continue
        entry = next((entry for entry in _METRIC_MEANINGS if name.startswith(entry[0])), None)
        meaning, lower = entry[1:] if entry else ("", None)
        change, verdict = _change(before.get(name), after.get(name), lower)
        if verdict in ("better", "worse") and measured is not None and difference(name, before, measured) != "clear":
            verdict = "noise"
        spread = after.get(f"{name}_std")
        rows.append(MetricRow(name, meaning, lower, before.get(name), after.get(name), change, verdict, spread))
    return rows


def _change(before: float | None, after: float | None, lower: bool | None) -> tuple[str, str]:
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return "", ""
    if before == after:
        return "no change", "same"
    text = ""
    if before > 0 and after > 0:
        factor = max(before, after) / min(before, after)
        sign = DIVIDED if after < before else TIMES
        text = f"{sign} {shown(factor) if factor >= 1000 else f'{factor:.3g}'}"
    if not text or text.endswith(" 1"):  # a kernel distance may be negative; and a factor of 1.003 would be shown as 1
        text = f"{after - before:+.3g}".replace("-", MINUS)
    verdict = "" if lower is None else "better" if (after < before) == lower else "worse"
    return text, verdict
