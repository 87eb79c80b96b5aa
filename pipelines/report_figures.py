"""The figures of a report: training curves by matplotlib, and the lineage as a layered diagram.

Columns of the diagram go from left to right. An edge that passes a column keeps a lane of its own there, so
that it never runs through a box.
"""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.sample_grid import shortened

MAX_CURVE_POINTS = 500  # a longer history is averaged over bins, so that the page stays small

Array = NDArray[Any]


def data_uri(media_type: str, content: bytes) -> str:
    """Content as an address that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


# Training curves

_INK = {"light": "#57606a", "dark": "#a9b3be"}
_CURVES = {  # column -> (label, colour on light, colour on dark)
    "loss": ("total", "#24292f", "#e6edf3"),
    "loss_full": ("full pass", "#0b62c4", "#6cb0ff"),
    "loss_masked": ("masked pass", "#b35000", "#ffab5e"),
    "lr": ("learning rate", "#0f766e", "#4fd1c0"),
    "grad_norm": ("gradient norm", "#7c3aed", "#c4a5ff"),
}


@dataclass(frozen=True)
class Curves:
    """One figure in two themes, as data URIs of SVG."""

    light: str
    dark: str
    description: str


def training_curves(history: Sequence[Mapping[str, float]]) -> list[Curves]:
    """A figure of the losses, and one of learning rate and gradient norm, as far as they were recorded."""
    table = _history_table(history)
    figures = []
    for panels in ((("loss", "loss_full", "loss_masked"),), (("lr",), ("grad_norm",))):
        present = [[name for name in panel if name in table] for panel in panels]
        if any(present):
            drawn = [names for names in present if names]
            figures.append(
                Curves(
                    light=_draw_curves(table, drawn, "light"),
                    dark=_draw_curves(table, drawn, "dark"),
                    description="; ".join(_describe(table, name) for names in drawn for name in names),
                )
            )
    return figures


def _history_table(history: Sequence[Mapping[str, float]]) -> dict[str, Array]:
    """Columns float64 [rows], at most MAX_CURVE_POINTS rows, each the mean of a bin of consecutive rows."""
    table = {}
    for name in ("step", *_CURVES):
        column = np.array([row.get(name, math.nan) for row in history], dtype=np.float64)
        if np.isfinite(column).any():
            bins = np.array_split(column, min(len(column), MAX_CURVE_POINTS))
            table[name] = np.array([part.mean() for part in bins])
    return table


def _describe(table: Mapping[str, Array], name: str) -> str:
    finite = np.isfinite(table[name])
    values, steps = table[name][finite], table["step"][finite]
    label = _CURVES[name][0] + (" loss" if name.startswith("loss") else "")
    first, last = (f"{values[i]:.3g} at step {steps[i]:,.0f}" for i in (0, -1))
    return f"{label} from {first} to {last}"


def _draw_curves(table: Mapping[str, Array], panels: Sequence[Sequence[str]], theme: str) -> str:
    """Panels one above the other over the same steps; SVG with a transparent background."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text stays text, in the reader's own font; ids are salted, so that they are the same in every run.
    with rc_context({"svg.hashsalt": "edt", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(4.8, 3.1), facecolor="none", layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, names in zip(axes, panels, strict=True):
            for name in names:
                label, light, dark = _CURVES[name]
                colour = light if theme == "light" else dark
                marker = "o" if len(table["step"]) == 1 else None
                axis.plot(table["step"], table[name], label=label, color=colour, linewidth=1.6, marker=marker)
            _style_axis(axis, names, table, _INK[theme])
        axes[-1].set_xlabel("optimizer step", color=_INK[theme])
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", buffer.getvalue().decode())
    return data_uri("image/svg+xml", svg.encode())


def _style_axis(axis: Any, names: Sequence[str], table: Mapping[str, Array], ink: str) -> None:
    positive = [table[name][table[name] > 0] for name in names]
    values = np.concatenate(positive)
    if names[0] != "lr" and len(values) and values.max() > 20 * values.min():
        axis.set_yscale("log")
    elif names[0] == "lr":
        axis.set_ylim(bottom=0)
    title = _CURVES[names[0]][0] if len(names) == 1 and not names[0].startswith("loss") else "training loss"
    axis.set_title(title, loc="left", color=ink, fontsize=9)
    axis.grid(color=ink, alpha=0.25, linewidth=0.6)
    axis.tick_params(colors=ink, length=0, which="both")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(ink)
    axis.set_facecolor("none")
    if len(names) > 1:
        axis.legend(frameon=False, labelcolor=ink, ncols=len(names), loc="upper right")


# Lineage

# px: from column to column, a box, from box to box, the room of a passing edge, around all, an arrow's tip
_COLUMN, _NODE_WIDTH, _NODE_HEIGHT, _ROW, _LANE, _MARGIN, _TIP = 138, 116, 58, 74, 22, 2, 4
Slot = tuple[str, int]  # a step, and a column that it or its edge is in
BoxText = tuple[str, str, tuple[str, str, str]]  # role, tooltip, lines
_MODEL = "\0model"  # stands for the registered model; no step has this name


@dataclass(frozen=True)
class LineageRow:
    """A committed step on the way to the model. `inputs` names the steps, or the source, it was made from."""

    step: str
    kind: str
    fingerprint: str
    digest: str
    inputs: tuple[str, ...]
    uri: str
    run_id: str | None  # the MLflow run that made it
    seconds: float  # how long the step took when it ran
    code_version: str
    registered: bool = False  # the registered version stands for this artifact


@dataclass(frozen=True)
class GraphNode:
    """A box of the diagram, its top left corner in px."""

    x: float
    y: float
    lines: tuple[str, str, str]  # name, kind, short fingerprint
    tooltip: str
    role: str  # "source", "step" or "model"


@dataclass(frozen=True)
class Graph:
    """The lineage as boxes and SVG paths, in px."""

    width: int
    height: int
    node_width: int
    node_height: int
    nodes: list[GraphNode]
    paths: list[str]


def lineage_graph(rows: Sequence[LineageRow], model: str) -> Graph:
    """From the source at the left to the registered model at the right; `model` is what that is called.

    A step stands right of all of its inputs. Registered artifacts lead to the model.
    Raises ValueError where two rows have one name, or where the lineage runs in a circle.
    """
    names = [row.step for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"lineage steps share a name: {names}; inputs go by name, so give each its own")
    made_from = {row.step: tuple(dict.fromkeys(row.inputs)) for row in rows}
    made_from[_MODEL] = tuple(row.step for row in rows if row.registered)
    column: dict[str, int] = {}
    for step in TopologicalSorter(made_from).static_order():
        column[step] = 1 + max((column[name] for name in made_from.get(step, ())), default=-1)

    centre = _centres(made_from, column)
    boxes = _texts(rows, model)
    nodes = []
    for step, number in column.items():
        role, tooltip, lines = boxes.get(step) or _input_text(step)
        shown = (shortened(lines[0], 13), shortened(lines[1], 16), lines[2])
        top = round(centre[step, number] - _NODE_HEIGHT / 2, 1)
        nodes.append(GraphNode(_MARGIN + number * _COLUMN, top, shown, tooltip, role))
    paths = [_edge_path(start, end, column, centre) for end, inputs in made_from.items() for start in inputs]
    width = 2 * _MARGIN + max(column.values()) * _COLUMN + _NODE_WIDTH
    height = max(centre[slot] + _half_height(slot, column) for slot in centre) + _MARGIN
    return Graph(width, math.ceil(height), _NODE_WIDTH, _NODE_HEIGHT, nodes, paths)


def _texts(rows: Sequence[LineageRow], model: str) -> dict[str, BoxText]:
    """The text of every step's box, and of the model's."""
    texts = {
        row.step: ("step", f"{row.step} {row.fingerprint}", (row.step, row.kind, row.fingerprint[:8])) for row in rows
    }
    return texts | {_MODEL: ("model", model, ("registry", "model version", ""))}


def _input_text(name: str) -> BoxText:
    """What no row makes comes from outside: the raw images, or for example a published autoencoder."""
    return "source", name, (name, "raw images" if name == "source" else "input", "")


def _half_height(slot: Slot, column: Mapping[str, int]) -> float:
    """Of a box where the step stands in this column, of a line where its edge only passes."""
    return _NODE_HEIGHT / 2 if column[slot[0]] == slot[1] else 1.0


def _centres(made_from: Mapping[str, Sequence[str]], column: Mapping[str, int]) -> dict[Slot, float]:
    """y of each (step, column) in which a step has its box or, where its edge runs on, a lane of its own.

    A slot wants the mean height of what leads to it; slots of a column that want the same place move apart.
    """
    reach = dict(column)
    for end, inputs in made_from.items():
        for start in inputs:
            reach[start] = max(reach[start], column[end] - 1)
    centre: dict[Slot, float] = {}
    for number in range(max(column.values()) + 1):
        wanted = {}
        for step, first in column.items():
            if first <= number <= reach[step]:
                before = made_from.get(step, ()) if first == number else (step,)
                heights = [centre[name, number - 1] for name in before]
                wanted[step] = sum(heights) / max(1, len(heights))
        placed: dict[str, float] = {}
        below = -math.inf
        for step in sorted(wanted, key=lambda name: wanted[name]):
            half = (_ROW if column[step] == number else _LANE) / 2
            placed[step] = max(wanted[step], below + half)
            below = placed[step] + half
        shift = sum(wanted[step] - placed[step] for step in placed) / max(1, len(placed))
        centre |= {(step, number): y + shift for step, y in placed.items()}
    top = min(centre[slot] - _half_height(slot, column) for slot in centre) - _MARGIN
    return {slot: y - top for slot, y in centre.items()}


def _edge_path(start: str, end: str, column: Mapping[str, int], centre: Mapping[Slot, float]) -> str:
    """An SVG path from the right side of `start`, along its lane, to the left side of `end`."""
    between = range(column[start], column[end])
    slots = [*((start, number) for number in between), (end, column[end])]
    heights = [round(centre[slot], 1) for slot in slots]
    bend = (_COLUMN - _NODE_WIDTH) * 0.6
    path = ""
    for number, (y, to_y) in zip(between, pairwise(heights), strict=True):
        x = _MARGIN + number * _COLUMN + _NODE_WIDTH
        arrives = number == between[-1]
        to_x = x + _COLUMN - _NODE_WIDTH - (_TIP if arrives else 0)
        path += "" if path else f"M{x} {y}"
        path += f"C{x + bend:g} {y} {to_x - bend:g} {to_y} {to_x} {to_y}"
        path += "" if arrives else f"H{to_x + _NODE_WIDTH}"
    return path
