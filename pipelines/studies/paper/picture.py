"""The picture of a table: each training as a point, beside a panel with the published values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.stages.train import history
from pipelines.report.along import read_along
from pipelines.report.figures import BLUE, INK, ORANGE
from pipelines.report.inputs import read_samples
from pipelines.studies.paper.render import title_of
from pipelines.studies.paper.results import Results

_ROW_IN, _DPI = 0.32, 130  # inches of a row
_COLOURS = ("#0b62c4", "#b35000", "#2a7f3a", "#8a3ab8", "#57606a", "#c4220b", "#007d8a", "#9a7b00")


def draw(results: Results, path: Path) -> None:
    """Write the picture of a table as PNG. Rows without results are named, and have no points."""
    from matplotlib.figure import Figure

    paint = {"placement": _placement, "curve": _curves, "losses": _losses, "pictures": _pictures}.get(
        results.table.kind, _points
    )
    figure = Figure(figsize=(9, 1.6 + _ROW_IN * max(len(results.rows), 6)), layout="constrained")
    paint(figure, results)
    figure.suptitle(f"{title_of(results.table, results.name)}\nmeasured at scale {results.scale}", fontsize=10)
    figure.savefig(path, dpi=_DPI)


def _points(figure: Any, results: Results) -> None:
    """The metric that decides, of each training; published values in a panel of their own, never on the same axis."""
    published = next((name for row in results.rows for name in row.published), None)
    axes = figure.subplots(1, 2 if published else 1, sharey=True, squeeze=False)[0]
    labels = [row.label for row in results.rows]
    better = "lower" if results.lower_is_better else "higher"
    for place, row in enumerate(results.rows):
        values = [metrics[results.metric] for metrics in row.trainings.values() if results.metric in metrics]
        axes[0].plot(values, [place] * len(values), "o", color=ORANGE if row.name == results.base else BLUE, alpha=0.8)
        if published and published in row.published:
            axes[1].plot(row.published[published], place, "D", color=INK, markerfacecolor="none")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    axes[0].set_title(f"measured here: {results.metric}\na point a training, {better} is better", fontsize=9)
    if published:
        axes[1].set_title(f"published: {published}\nof other models, data and protocol", fontsize=9)
    for axis in axes:
        axis.grid(axis="x", linewidth=0.4, alpha=0.6)


def _placement(figure: Any, results: Results) -> None:
    """The blocks of each row, those that are modulated filled, beside the metric of its trainings."""
    strips, points = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(results.rows):
        for block in range(row.blocks):
            local = block in row.amm_blocks
            strips.add_patch(_box(block, place, BLUE if local else "none"))
        values = [metrics[results.metric] for metrics in row.trainings.values() if results.metric in metrics]
        points.plot(values, [place] * len(values), "o", color=ORANGE if row.name == results.base else BLUE, alpha=0.8)
    strips.set_xlim(-0.7, max(row.blocks for row in results.rows) - 0.3)
    strips.set_yticks(range(len(results.rows)), [row.label for row in results.rows])
    strips.set_ylim(len(results.rows) - 0.5, -0.5)
    strips.set_xlabel("block; filled: local attention")
    strips.xaxis.get_major_locator().set_params(integer=True)
    points.set_title(f"measured here: {results.metric}, a point a training", fontsize=9)


def _box(block: int, place: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((block - 0.4, place - 0.3), 0.8, 0.6, facecolor=colour, edgecolor=INK, linewidth=0.8)


def _curves(figure: Any, results: Results) -> None:
    """The metric that decides, along the first training of each row."""
    axis = figure.subplots()
    for place, row in enumerate(results.rows):
        if "along" in row.artifacts:
            points = read_along(row.artifacts["along"])["points"]
            xs, ys = [point["step"] for point in points], [point.get(results.metric) for point in points]
            colour = _COLOURS[place % len(_COLOURS)]
            axis.plot(xs, ys, "o-", color=colour, markersize=3, linewidth=1.2, label=row.label)
    axis.set_title(f"measured here: {results.metric} along the training", fontsize=9)
    axis.set_xlabel("optimizer step")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def _losses(figure: Any, results: Results) -> None:
    """Losses of both passes of the first training of each row, each scaled to 0..1 as in the paper."""
    axes = figure.subplots(1, len(results.rows), sharey=True, squeeze=False)[0]
    for axis, row in zip(axes, results.rows, strict=True):
        rows = history(row.artifacts["checkpoint"]) if "checkpoint" in row.artifacts else []
        for name, colour in (("loss_full", "#2a7f3a"), ("loss_masked", "#c4220b")):
            values = [entry[name] for entry in rows if name in entry]
            if len(values) > 1:
                axis.plot([entry["step"] for entry in rows if name in entry], scaled(values), color=colour, label=name)
        axis.set_title(row.label, fontsize=9)
        axis.set_xlabel("optimizer step")
    axes[0].set_ylabel("loss, scaled to 0..1")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8)


def scaled(values: Sequence[float]) -> list[float]:
    """Values shifted and scaled to 0..1; all 0 if they are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def _pictures(figure: Any, results: Results) -> None:
    """The first samples of each class, a line a row: equal noise and labels above each other."""
    import numpy as np

    shown: dict[str, Any] = {}
    for row in results.rows:
        if "features" in row.artifacts:
            classes = np.arange(int(results.setting["classes"]))
            samples = read_samples(row.artifacts["features"], classes)
            firsts = [int(np.flatnonzero(samples.labels == label)[0]) for label in np.unique(samples.labels)[:10]]
            shown[row.label] = np.concatenate(list(samples.images[firsts]), axis=1)
    axes = figure.subplots(max(1, len(shown)), 1, squeeze=False)[:, 0]
    for axis, (label, image) in zip(axes, shown.items(), strict=False):
        axis.imshow(image, interpolation="nearest" if image.shape[0] <= 64 else None)
        axis.set_title(label, fontsize=9)
    for axis in axes:
        axis.set_axis_off()
