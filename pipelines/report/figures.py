"""The figures of a report, by matplotlib as SVG: losses, distances to neighbours, and earlier champions.

Each has a light and a dark version, on a transparent background. Text stays text, in the reader's font.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.training.validation.overfitting import HELD_OUT_LOSS
from pipelines.report.history import Champion

MAX_CURVE_POINTS = 500  # a longer history is averaged over bins, so that the page stays small
_TIMESTEP_BINS = 50
_ONE_ROW = 60  # characters of the labels in a legend of one row
_LOG_FROM = 20  # largest value / smallest value: above this, an axis is logarithmic

Array = NDArray[Any]
INK, BLACK, BLUE, ORANGE, TEAL, VIOLET = "#57606a", "#24292f", "#0b62c4", "#b35000", "#0f766e", "#7c3aed"
_ON_DARK = {
    INK: "#a9b3be",
    BLACK: "#e6edf3",
    BLUE: "#6cb0ff",
    ORANGE: "#ffab5e",
    TEAL: "#4fd1c0",
    VIOLET: "#c4a5ff",
}

_CURVES = {  # column of the history -> (label, colour)
    "loss": ("total", BLACK),
    "loss_full": ("full pass", BLUE),
    "loss_masked": ("masked pass", ORANGE),
    HELD_OUT_LOSS: ("held-out loss (averaged weights)", TEAL),
    "lr": ("learning rate", TEAL),
    "grad_norm": ("gradient norm", VIOLET),
    "loss_t0": ("1st quarter (least noise)", BLUE),
    "loss_t1": ("2nd", TEAL),
    "loss_t2": ("3rd", ORANGE),
    "loss_t3": ("4th (most noise)", VIOLET),
}
_QUARTERS = ("loss_t0", "loss_t1", "loss_t2", "loss_t3")


def data_uri(media_type: str, content: bytes) -> str:
    """Content as a base64 data URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Picture:
    """One figure in two themes, as data URIs of SVG, with a description for screen readers."""

    light: str
    dark: str
    description: str


Paint = Callable[[list[Any]], None]  # draws on axes, in the colours of a light page


def drawn(description: str, paint: Paint, panels: int = 1) -> Picture:
    """The figure that `paint` draws on `panels` axes, one above the other, in this module's colours."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_look()):
        figure = Figure(figsize=(4.8, 3.1), facecolor="none", layout="constrained")
        axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
        paint(axes)
        for axis in axes:
            handles, labels = axis.get_legend_handles_labels()
            if len(labels) > 1:  # below the axes, where the legend covers nothing
                columns = len(labels) if sum(map(len, labels)) < _ONE_ROW else 2
                figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", buffer.getvalue().decode())
    dark = re.sub("|".join(_ON_DARK), lambda match: _ON_DARK[match[0]], svg)
    light_uri, dark_uri = (data_uri("image/svg+xml", text.encode()) for text in (svg, dark))
    return Picture(light_uri, dark_uri, description)


def _look() -> Any:
    """matplotlib's settings for all figures. The fixed salt makes ids equal in every run."""
    look: dict[str, Any] = {"svg.hashsalt": "edt", "svg.fonttype": "none", "font.size": 9, "axes.facecolor": "none"}
    look |= {"axes.titlelocation": "left", "axes.titlesize": 9, "axes.axisbelow": True, "axes.grid": True}
    look |= {"grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8}
    look |= {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    look |= {f"{axis}tick.{part}.size": 0 for axis in "xy" for part in ("major", "minor")}
    inked = ("axes.titlecolor", "axes.labelcolor", "axes.edgecolor", "grid.color", "xtick.color", "ytick.color")
    return look | dict.fromkeys((*inked, "legend.labelcolor"), INK)


def _log_where_wide(axis: Any, values: Array) -> None:
    positive = values[values > 0]
    if len(positive) and positive.max() > _LOG_FROM * positive.min():
        axis.set_yscale("log")


# Training


def training_curves(history: Sequence[Mapping[str, float]]) -> list[Picture]:
    """A figure of the losses, and one of learning rate and gradient norm, of the columns that were recorded.

    The held-out loss has a panel of its own below the others: it is another mean, and its changes are small.
    """
    table = _history_table(history)
    pictures = []
    for panels in ((("loss", "loss_full", "loss_masked"), (HELD_OUT_LOSS,)), (("lr",), ("grad_norm",))):
        present = [[name for name in panel if name in table] for panel in panels]
        if shown := [names for names in present if names]:
            pictures.append(_curves(table, shown))
    return pictures


def _history_table(history: Sequence[Mapping[str, float]]) -> dict[str, Array]:
    """Columns float64 [rows], at most MAX_CURVE_POINTS rows, each the mean of a bin of consecutive rows."""
    table = {}
    for name in ("step", *_CURVES):
        column = np.array([row.get(name, math.nan) for row in history], dtype=np.float64)
        if np.isfinite(column).any():
            bins = np.array_split(column, min(len(column), MAX_CURVE_POINTS))
            table[name] = np.array([_mean(part) for part in bins])
    return table


def _mean(values: Array) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _curves(table: Mapping[str, Array], panels: Sequence[Sequence[str]], title: str = "training loss") -> Picture:
    """Panels one above the other over the same steps."""

    def paint(axes: list[Any]) -> None:
        for axis, names in zip(axes, panels, strict=True):
            for name in names:
                label, colour = _CURVES[name]
                known = np.isfinite(table[name])  # a row of the held-out loss may have nothing else
                marker = "o" if known.sum() == 1 else None
                steps, values = table["step"][known], table[name][known]
                axis.plot(steps, values, label=label, color=colour, linewidth=1.6, marker=marker)
            if names[0] == "lr":
                axis.set_ylim(bottom=0)
            else:
                _log_where_wide(axis, np.concatenate([table[name] for name in names]))
            alone = len(names) == 1 and not names[0].startswith("loss")
            axis.set_title(_CURVES[names[0]][0] if alone else title)
        axes[-1].set_xlabel("optimizer step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)

    described = "; ".join(_describe(table, name) for names in panels for name in names)
    return drawn(described, paint, len(panels))


def _describe(table: Mapping[str, Array], name: str) -> str:
    finite = np.isfinite(table[name])
    values, steps = table[name][finite], table["step"][finite]
    label = _CURVES[name][0] + (" loss" if name.startswith("loss") else "")
    first, last = (f"{values[i]:.3g} at step {steps[i]:,.0f}" for i in (0, -1))
    return f"{label} from {first} to {last}"


def timestep_curves(
    history: Sequence[Mapping[str, float]], final: Array | None, num_timesteps: int
) -> tuple[Picture | None, Picture | None]:
    """The loss at the end of training by timestep, and the loss of each quarter of the timesteps during training.

    final: mean of the last losses at each timestep, [T], NaN if there is none; None if only quarters are recorded.
    """
    table = _history_table(history)
    quarters = [name for name in _QUARTERS if name in table]
    over_time = _curves(table, [quarters], "loss by quarter of the timesteps") if quarters else None
    if final is not None:
        edges = np.linspace(0, len(final), min(_TIMESTEP_BINS, len(final)) + 1).round().astype(int)
        return _final_losses(edges, [_mean(part) for part in np.split(final, edges[1:-1])]), over_time
    if quarters:
        edges = np.linspace(0, num_timesteps, len(_QUARTERS) + 1).round().astype(int)
        return _final_losses(edges, [_last(table, name) for name in _QUARTERS]), over_time
    return None, None


def _last(table: Mapping[str, Array], name: str) -> float:
    """The mean of the last tenth of a column."""
    column = table.get(name, np.array([math.nan]))
    return _mean(column[-max(1, len(column) // 10) :])


def _final_losses(edges: Array, losses: Sequence[float]) -> Picture:
    values = np.asarray(losses)

    def paint(axes: list[Any]) -> None:
        axes[0].stairs(values, edges, baseline=None, color=BLUE, linewidth=1.6)
        _log_where_wide(axes[0], values)
        axes[0].set_title("loss at the end of training")
        axes[0].set_xlabel("timestep (0: least noise)")

    finite = np.flatnonzero(np.isfinite(values))
    summary = "; ".join(f"{values[i]:.3g} at timesteps {edges[i]} to {edges[i + 1] - 1}" for i in finite[[0, -1]])
    return drawn(f"loss by timestep: {summary}", paint)


# Neighbours and champions


def distance_histogram(generated: Array, real: Array) -> Picture:
    """Histogram of the distances to the nearest real image: of generated images, and between real images."""
    edges = np.histogram_bin_edges(np.concatenate([generated, real]), bins=30)
    sets = (("generated to real", generated, BLUE), ("real to another real", real, ORANGE))

    def paint(axes: list[Any]) -> None:
        for label, values, colour in sets:
            share = 100 * np.histogram(values, edges)[0] / max(1, len(values))
            axes[0].stairs(share, edges, label=label, color=colour, linewidth=1.6)
        axes[0].set_xlim(left=0)
        axes[0].set_title("share of images, %")
        axes[0].set_xlabel("distance to the nearest real image")

    summary = "; ".join(f"{label}: half are within {np.median(values):.3g}" for label, values, _ in sets)
    return drawn(f"distances to the nearest real image; {summary}", paint)


def champion_trend(
    champions: Sequence[Champion], version: str, value: float, spread: float | None, metric: str, crowned: bool
) -> Picture:
    """The metric of earlier champions, oldest first, and of this version, which is on their line if `crowned`.

    Champions with another protocol have hollow markers, and are not on the line.
    """
    measured = [(place, champion) for place, champion in enumerate(champions) if champion.value is not None]
    like = [(place, champion.value, champion.spread) for place, champion in measured if champion.comparable]
    unlike = [(place, champion.value, champion.spread) for place, champion in measured if not champion.comparable]
    here = (len(champions), value, spread)
    names = [*(f"v{champion.version}" for champion in champions), f"v{version}"]

    def paint(axes: list[Any]) -> None:
        axis = axes[0]
        line = [*like, here] if crowned else like
        axis.plot([p for p, *_ in line], [v for _, v, _ in line], color=BLUE, linewidth=1.4)
        sets = (
            ("champion", like, "o", BLUE, BLUE),
            ("other protocol, not comparable", unlike, "o", INK, "none"),
            ("this version", [here], "D", ORANGE, ORANGE),
        )
        for label, points, marker, colour, face in sets:
            if points:
                places, values, spreads = zip(*points, strict=True)
                error = [s or math.nan for s in spreads]  # without a spread, no bar
                axis.errorbar(places, values, error, fmt=marker, color=colour, mfc=face, capsize=3, label=label, ms=6)
        every = max(1, math.ceil(len(names) / 10))
        ticks = range((len(names) - 1) % every, len(names), every)  # with the tick of this version
        axis.set_xticks(list(ticks), [names[place] for place in ticks])
        axis.margins(x=0.1, y=0.2)
        _log_where_wide(axis, np.array([v for _, v, _ in (*like, *unlike, here)]))
        axis.set_title(metric, parse_math=False)

    versions = [
        f"version {c.version} {c.value:.4g}{'' if c.comparable else ' by another protocol'}" for _, c in measured
    ]
    return drawn(f"{metric} of champions: {', '.join([*versions, f'this version {version} {value:.4g}'])}", paint)
