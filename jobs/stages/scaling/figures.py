"""The figures of a ladder: curves of equal FLOPs, the two laws, quality against the cost of training and sampling."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from edt_core.evaluation.config import ScalingConfig
from edt_core.evaluation.scaling import Fit, pareto
from edt_core.store.layout import SCALING_FIGURES

Row = Mapping[str, Any]
_PANEL, _HEIGHT, _DPI = 5.2, 4.2, 100  # inches, and pixels of an inch
_MARKERS = "os^Dvp*"  # of the models
_ACCURACY = "accuracy_classifier"
_COSTS = {"training_flops": "training FLOPs", "inference_flops": "FLOPs of one sample"}


def draw(config: ScalingConfig, rows: Sequence[Row], fits: Mapping[str, Fit]) -> dict[str, bytes]:
    """PNG files by name."""
    measures = {"quality.png": (config.metric, config.lower_is_better), "labels.png": (_ACCURACY, False)}
    panels: dict[str, list[Callable[[Any], None]]] = {
        "iso-flop.png": [
            partial(_iso_flop, model=model, rows=_of_model(rows, model), laws=fits.get(model))
            for model in _models(rows)
        ],
        "laws.png": [partial(_sizes, fits=fits), partial(_losses, rows=rows, fits=fits)],
        **{
            name: [partial(_against, rows=rows, cost=cost, metric=metric, lower_is_better=lower) for cost in _COSTS]
            for name, (metric, lower) in measures.items()
        },
    }
    return {name: _figure(panels[name]) for name in SCALING_FIGURES}


def _figure(panels: Sequence[Callable[[Any], None]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL * len(panels), _HEIGHT), dpi=_DPI, layout="constrained")
    for axes, paint in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        paint(axes)
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _iso_flop(panel: Any, model: str, rows: Sequence[Row], laws: Fit | None) -> None:
    """Losses of one model's widths, a colour for each budget, with the parabolas and their minima."""
    for number, budget in enumerate(sorted({row["budget"] for row in rows})):
        own = [row for row in rows if row["budget"] == budget]
        colour = f"C{number % 10}"
        panel.scatter([row["parameters"] for row in own], [row["loss"] for row in own], color=colour, s=18)
        panel.plot([], [], color=colour, label=f"{budget:.3g} FLOPs")
        if laws is not None:
            minimum = laws.minima[number]
            sizes = np.geomspace(min(r["parameters"] for r in own), max(r["parameters"] for r in own), 60)
            panel.plot(sizes, minimum.at(sizes), color=colour, linewidth=1)
            panel.scatter([minimum.parameters], [minimum.loss], color=colour, marker="x", s=60)
    panel.set(xscale="log", xlabel="parameters", ylabel="held-out loss", title=model)


def _sizes(panel: Any, fits: Mapping[str, Fit]) -> None:
    for number, (model, laws) in enumerate(fits.items()):
        budgets = [minimum.budget for minimum in laws.minima]
        line = np.geomspace(min(budgets), max(budgets), 20)
        panel.scatter(budgets, [minimum.parameters for minimum in laws.minima], color=f"C{number}")
        label = f"{model}: C^{laws.size_exponent:.2f}"
        panel.plot(line, [laws.size(float(budget)) for budget in line], color=f"C{number}", label=label)
    _scales(panel, fits, "parameters at the minimum")


def _losses(panel: Any, rows: Sequence[Row], fits: Mapping[str, Fit]) -> None:
    for number, (model, laws) in enumerate(fits.items()):
        own = _of_model(rows, model)
        panel.scatter([r["budget"] for r in own], [r["loss"] for r in own], color=f"C{number}", s=10, alpha=0.5)
        budgets = [minimum.budget for minimum in laws.minima]
        line = np.geomspace(min(budgets), max(budgets), 40)
        label = f"{model}: {laws.floor:.3g} + {laws.loss_scale:.3g} C^-{laws.loss_exponent:.2f}"
        panel.plot(line, [laws.loss(float(budget)) for budget in line], color=f"C{number}", label=label)
    _scales(panel, fits, "held-out loss")


def _scales(panel: Any, fits: Mapping[str, Fit], label: str) -> None:
    if not fits:
        panel.text(0.5, 0.5, "the points determine no law", transform=panel.transAxes, ha="center", color="0.35")
        return
    panel.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=label)


def _against(panel: Any, rows: Sequence[Row], cost: str, metric: str, lower_is_better: bool) -> None:
    """A metric of all models against a cost, with the front of those that nothing cheaper beats."""
    measured = [row for row in rows if row.get(metric) is not None]
    if not measured:
        panel.text(0.5, 0.5, f"{metric} was not measured", transform=panel.transAxes, ha="center", color="0.35")
        return
    for number, model in enumerate(_models(rows)):
        own = _of_model(measured, model)
        marker = _MARKERS[number % len(_MARKERS)]
        panel.scatter([row[cost] for row in own], [row[metric] for row in own], marker=marker, s=24, label=model)
    costs, values = [row[cost] for row in measured], [row[metric] for row in measured]
    front = pareto(costs, values, lower_is_better=lower_is_better)
    panel.step(
        [costs[i] for i in front], [values[i] for i in front], where="post", color="0.4", linewidth=1, label="front"
    )
    panel.set(xscale="log", xlabel=_COSTS[cost], ylabel=metric)


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _of_model(rows: Sequence[Row], model: str) -> list[Row]:
    return [row for row in rows if row["model"] == model]
