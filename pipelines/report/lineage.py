"""The lineage of a report as a layered diagram, in two directions: to the right, and down for narrow pages.

A step is in the rank after the last of its inputs. An edge that passes a rank has its own lane there, so that it never
crosses a box. Positions have two coordinates: `along` the direction, and `across` it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise

from edt_core.sampling.grid import shortened

_NODE_WIDTH, _NODE_HEIGHT, _MARGIN, _TIP = 116, 58, 2, 4  # px: size of a box, outer margin, arrow tip
_NAME = 13  # characters of a name that fit into a box
Slot = tuple[str, int]  # a step, and a rank that it or its edge is in
BoxText = tuple[str, str, tuple[str, str, str]]  # role, tooltip, lines
_MODEL = "\0model"  # the registered model; no step has this name


@dataclass(frozen=True)
class _Direction:
    """The distances of a diagram in px. `rank`, `box`: along; `row`, `across`: between boxes of a rank, of a box."""

    down: bool
    rank: int
    box: int
    row: int
    across: int
    lane: int  # of an edge that passes a rank

    def half(self, is_box: bool) -> float:
        """Half the extent across of a box, or of the line of a passing edge."""
        return self.across / 2 if is_box else 1.0

    def point(self, along: float, across: float) -> str:
        """A point as an SVG path has it: x y."""
        return f"{across:g} {along:g}" if self.down else f"{along:g} {across:g}"


_RIGHT = _Direction(down=False, rank=138, box=_NODE_WIDTH, row=74, across=_NODE_HEIGHT, lane=22)
_DOWN = _Direction(down=True, rank=92, box=_NODE_HEIGHT, row=126, across=_NODE_WIDTH, lane=13)


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
    lines: tuple[str, str, str]  # name, kind or the rest of a long name, short fingerprint
    long_name: bool  # the name takes two lines
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


def lineage_graph(rows: Sequence[LineageRow], model: str, down: bool = False) -> Graph:
    """The diagram from the source at the left to the registered model at the right, or from top to bottom.

    A step is behind all its inputs. Registered artifacts lead to the model. `model`: the model's name.
    Raises ValueError if two rows have the same name, or if the lineage is cyclic.
    """
    names = [row.step for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"lineage steps share a name: {names}; inputs go by name, so names must be unique")
    parents = {row.step: tuple(dict.fromkeys(row.inputs)) for row in rows}
    parents[_MODEL] = tuple(row.step for row in rows if row.registered)
    rank: dict[str, int] = {}
    for step in TopologicalSorter(parents).static_order():
        rank[step] = 1 + max((rank[name] for name in parents.get(step, ())), default=-1)

    way = _DOWN if down else _RIGHT
    centre = _centres(parents, rank, way)
    boxes = _texts(rows, model)
    nodes = []
    for step, number in rank.items():
        corner = (_MARGIN + number * way.rank, round(centre[step, number] - way.across / 2, 1))
        x, y = reversed(corner) if down else corner
        nodes.append(_node(x, y, *(boxes.get(step) or _input_text(step))))
    paths = [_edge_path(start, end, rank, centre, way) for end, inputs in parents.items() for start in inputs]
    length = 2 * _MARGIN + max(rank.values()) * way.rank + way.box
    breadth = max(centre[slot] + way.half(rank[slot[0]] == slot[1]) for slot in centre) + _MARGIN
    width, height = (math.ceil(breadth), length) if down else (length, math.ceil(breadth))
    return Graph(width, height, _NODE_WIDTH, _NODE_HEIGHT, nodes, paths)


def _node(x: float, y: float, role: str, tooltip: str, lines: tuple[str, str, str]) -> GraphNode:
    """A box. A name of several words that is too long for a line takes the line of the kind as well."""
    name, kind, fingerprint = lines
    first, _, rest = name.partition(" ")
    if long_name := len(name) > _NAME and bool(rest):
        name, kind = first, shortened(rest, _NAME)
    shown = (shortened(name, _NAME), shortened(kind, 16), fingerprint)
    return GraphNode(x, y, shown, long_name, tooltip, role)


def _texts(rows: Sequence[LineageRow], model: str) -> dict[str, BoxText]:
    """The text of every step's box, and of the model's."""
    texts = {
        row.step: ("step", f"{row.step} {row.fingerprint}", (row.step, row.kind, row.fingerprint[:8])) for row in rows
    }
    return texts | {_MODEL: ("model", model, ("registry", "model version", ""))}


def _input_text(name: str) -> BoxText:
    """The text of an input that no step makes: the raw images, or for example a published autoencoder."""
    return "source", name, (name, "raw images" if name == "source" else "input", "")


def _centres(parents: Mapping[str, Sequence[str]], rank: Mapping[str, int], way: _Direction) -> dict[Slot, float]:
    """The place across of each (step, rank) in which the step has its box, or a lane for its edge to a later rank.

    The preferred place of a slot is the mean place of its predecessors. Slots of a rank that overlap move apart.
    """
    reach = dict(rank)
    for end, inputs in parents.items():
        for start in inputs:
            reach[start] = max(reach[start], rank[end] - 1)
    centre: dict[Slot, float] = {}
    for number in range(max(rank.values()) + 1):
        preferred = {}
        for step, first in rank.items():
            if first <= number <= reach[step]:
                before = parents.get(step, ()) if first == number else (step,)
                places = [centre[name, number - 1] for name in before]
                preferred[step] = sum(places) / max(1, len(places))
        position: dict[str, float] = {}
        below = -math.inf
        for step in sorted(preferred, key=lambda name: preferred[name]):
            half = (way.row if rank[step] == number else way.lane) / 2
            position[step] = max(preferred[step], below + half)
            below = position[step] + half
        shift = sum(preferred[step] - position[step] for step in position) / max(1, len(position))
        centre |= {(step, number): place + shift for step, place in position.items()}
    least = min(centre[slot] - way.half(rank[slot[0]] == slot[1]) for slot in centre) - _MARGIN
    return {slot: place - least for slot, place in centre.items()}


def _edge_path(start: str, end: str, rank: Mapping[str, int], centre: Mapping[Slot, float], way: _Direction) -> str:
    """An SVG path from the far side of `start`, along its lane, to the near side of `end`."""
    between = range(rank[start], rank[end])
    slots = [*((start, number) for number in between), (end, rank[end])]
    places = [round(centre[slot], 1) for slot in slots]
    bend = (way.rank - way.box) * 0.6
    path = ""
    for number, (across, to_across) in zip(between, pairwise(places), strict=True):
        along = _MARGIN + number * way.rank + way.box
        arrives = number == between[-1]
        to_along = along + way.rank - way.box - (_TIP if arrives else 0)
        curve = ((along + bend, across), (to_along - bend, to_across), (to_along, to_across))
        path += "" if path else f"M{way.point(along, across)}"
        path += "C" + " ".join(way.point(*point) for point in curve)
        path += "" if arrives else f"L{way.point(to_along + way.box, to_across)}"
    return path
