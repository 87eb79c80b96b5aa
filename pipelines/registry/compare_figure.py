"""The figure of a comparison: a metric against each cost. Markers of versions are filled, published ones hollow."""

import io
from typing import Any

from pipelines.registry.compare import AXES, Comparison, Point

_WIDTH, _HEIGHT, _DPI = 13.5, 5.2, 100  # inches, and pixels of an inch
_PUBLISHED_MARKERS = {"EDT": "s", "DiT": "^", "MDTv2": "D"}
_LINEAR_TO = 5  # largest cost / smallest cost: below this, a logarithmic scale has too few ticks
_LOG_FROM = 10  # largest value / smallest value: above this, the metric has a logarithmic scale
_GREY = "0.35"
_PUBLISHED = "published: "


def draw(comparison: Comparison) -> bytes:
    """A PNG with one panel per cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    points = (*comparison.points, *comparison.published)
    values = [point.value for point in points]
    for panel, (axis, title) in zip(panels, AXES.items(), strict=True):
        _panel(panel, points, axis)
        panel.set_xlabel(title)
        panel.grid(alpha=0.3, which="both")
        if min(values) > 0 and max(values) > _LOG_FROM * min(values):
            panel.set_yscale("log")
    panels[0].set_ylabel(comparison.metric)
    figure.suptitle(f"{comparison.metric} against the cost of training", fontsize=12)
    handles: dict[str, Any] = {}
    for panel in panels:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, key=lambda label: label.startswith(_PUBLISHED))  # ours first
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=3, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _panel(panel: Any, points: tuple[Point, ...], axis: str) -> None:
    """One line per series, in the same colour in all panels. A panel without recorded costs says so."""
    series: dict[str, list[Point]] = {}
    for point in points:
        series.setdefault(point.series, []).append(point)
    drawn = False
    for number, (label, members) in enumerate(series.items()):
        line = sorted((p for p in members if getattr(p, axis)), key=lambda point: getattr(point, axis))
        if not line:
            continue
        drawn = True
        if line[0].source is None:
            _versions(panel, label, line, axis, f"C{number % 10}")
        else:
            _published(panel, label, line, axis)
    if drawn:
        _scale(panel, axis)
    else:
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", color=_GREY)
        panel.set_xticks([])


def _scale(panel: Any, axis: str) -> None:
    """Set a logarithmic scale, or a linear one for close costs. Ticks: images as 200 M, hours plain, FLOPs as 10^n."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    panel.margins(x=0.12)
    low, high = panel.get_xlim()
    if low > 0 and high < _LINEAR_TO * low:
        panel.xaxis.set_major_locator(MaxNLocator(5))
    else:
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _LOG_FROM**2 * low else (1,)))
    if axis == "images_seen":
        panel.xaxis.set_major_formatter(EngFormatter())
    elif axis == "device_hours":
        panel.xaxis.set_major_formatter(FuncFormatter(lambda hours, _: f"{hours:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _versions(panel: Any, label: str, points: list[Point], axis: str, color: str) -> None:
    for comparable in (True, False):
        chosen = [point for point in points if point.comparable is comparable]
        if not chosen:
            continue
        panel.errorbar(
            [getattr(point, axis) for point in chosen],
            [point.value for point in chosen],
            yerr=[point.spread or 0.0 for point in chosen],
            marker="o" if comparable else "x",
            linestyle="-" if comparable else "none",
            color=color,
            capsize=3,
            label=label if comparable else f"{label} (other protocol, not comparable)",
        )


def _published(panel: Any, label: str, points: list[Point], axis: str) -> None:
    family = label.partition(",")[0]
    panel.plot(
        [getattr(point, axis) for point in points],
        [point.value for point in points],
        marker=_PUBLISHED_MARKERS.get(family, "o"),
        markerfacecolor="none",
        markeredgecolor=_GREY,
        linestyle="none",
        label=f"{_PUBLISHED}{label}, FID-50k",
    )
    if axis == "training_flops":  # on the other axes many labels would overlap
        for point in points:
            size = point.model.partition("-")[2].partition("/")[0]
            place = (getattr(point, axis), point.value)
            panel.annotate(size, place, (6, -3), textcoords="offset points", fontsize=7, color=_GREY)
