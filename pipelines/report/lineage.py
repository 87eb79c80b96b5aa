"""The lineage of a report as a layered diagram.

Columns go from left to right. An edge that passes a column has its own lane there, so that it never crosses a box.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise

from edt_core.sampling.grid import shortened

# px: column distance, box width and height, row distance, lane of a passing edge, outer margin, arrow tip
_COLUMN, _NODE_WIDTH, _NODE_HEIGHT, _ROW, _LANE, _MARGIN, _TIP = 138, 116, 58, 74, 22, 2, 4
Slot = tuple[str, int]  # a step, and a column that it or its edge is in
BoxText = tuple[str, str, tuple[str, str, str]]  # role, tooltip, lines
_MODEL = "\0model"  # the registered model; no step has this name


@dataclass(frozen=True)
class LineageRow:
    """A committed step that the model was made from. `inputs`: names of the steps, or the source, of its inputs."""

    step: str
    kind: str
    fingerprint: str
    digest: str
    inputs: tuple[str, ...]
    uri: str
    run_id: str | None  # the MLflow run that made it
    code_version: str
    registered: bool = False  # the registered version records this artifact


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
    """The diagram from the source at the left to the registered model at the right. `model`: the model's name.

    A step is to the right of all its inputs. Registered artifacts lead to the model.
    Raises ValueError if two rows have the same name, or if the lineage is cyclic.
    """
    names = [row.step for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"lineage steps share a name: {names}; inputs go by name, so names must be unique")
    parents = {row.step: tuple(dict.fromkeys(row.inputs)) for row in rows}
    parents[_MODEL] = tuple(row.step for row in rows if row.registered)
    column: dict[str, int] = {}
    for step in TopologicalSorter(parents).static_order():
        column[step] = 1 + max((column[name] for name in parents.get(step, ())), default=-1)

    centre = _centres(parents, column)
    boxes = _texts(rows, model)
    nodes = []
    for step, number in column.items():
        role, tooltip, lines = boxes.get(step) or _input_text(step)
        shown = (shortened(lines[0], 13), shortened(lines[1], 16), lines[2])
        top = round(centre[step, number] - _NODE_HEIGHT / 2, 1)
        nodes.append(GraphNode(_MARGIN + number * _COLUMN, top, shown, tooltip, role))
    paths = [_edge_path(start, end, column, centre) for end, inputs in parents.items() for start in inputs]
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
    """The text of an input that no step makes: the raw images, or for example a published autoencoder."""
    return "source", name, (name, "raw images" if name == "source" else "input", "")


def _half_height(slot: Slot, column: Mapping[str, int]) -> float:
    """Half the height of the step's box if it is in this column, else of the line of its passing edge."""
    return _NODE_HEIGHT / 2 if column[slot[0]] == slot[1] else 1.0


def _centres(parents: Mapping[str, Sequence[str]], column: Mapping[str, int]) -> dict[Slot, float]:
    """y of each (step, column) in which the step has its box, or a lane for its edge to a later column.

    The preferred height of a slot is the mean height of its predecessors. Slots of a column that overlap move apart.
    """
    reach = dict(column)
    for end, inputs in parents.items():
        for start in inputs:
            reach[start] = max(reach[start], column[end] - 1)
    centre: dict[Slot, float] = {}
    for number in range(max(column.values()) + 1):
        preferred = {}
        for step, first in column.items():
            if first <= number <= reach[step]:
                before = parents.get(step, ()) if first == number else (step,)
                heights = [centre[name, number - 1] for name in before]
                preferred[step] = sum(heights) / max(1, len(heights))
        position: dict[str, float] = {}
        below = -math.inf
        for step in sorted(preferred, key=lambda name: preferred[name]):
            half = (_ROW if column[step] == number else _LANE) / 2
            position[step] = max(preferred[step], below + half)
            below = position[step] + half
        shift = sum(preferred[step] - position[step] for step in position) / max(1, len(position))
        centre |= {(step, number): y + shift for step, y in position.items()}
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
