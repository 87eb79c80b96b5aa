"""The lineage of a report as a layered diagram.

Columns go from left to right. An edge that passes a column keeps a lane of its own there, so that it never runs
through a box.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise

from edt_core.sampling.grid import shortened

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
