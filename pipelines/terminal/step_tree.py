"""The steps of a run as a tree, with state and progress. A step is below the deepest of the steps it needs.

preprocess                 reused
└ autoencoder              done        51 s
  └ encode                 running     ━━━━━━╸───────  1200/1797 images  310/s, 2 s left
    ├ train edt-s          waiting
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edt_core.printing.console import on_one_line
from jobs.runtime.board import Shown

if TYPE_CHECKING:
    from rich.text import Text

State = Literal["waiting", "running", "reused", "done", "failed", "skipped", "stopped"]
_STYLES: dict[State, str] = {
    "waiting": "dim",
    "running": "bold",
    "reused": "dim",
    "done": "green",
    "failed": "red",
    "skipped": "yellow",
    "stopped": "yellow",
}
_MARKS: dict[State, str] = {
    "waiting": "·",
    "running": "▸",
    "reused": "=",
    "done": "✓",
    "failed": "✗",
    "skipped": "-",
    "stopped": "‖",
}
_PLAIN_MARKS: dict[State, str] = {**_MARKS, "waiting": ".", "running": ">", "done": "+", "failed": "x", "stopped": "|"}
_ENDED = ("reused", "done")
_TALLIED: tuple[State, ...] = ("reused", "running", "failed", "skipped", "stopped")
SOURCE = "source"  # the driver's own work on the images, which is no step
_BAR = 14  # characters
_WIDE = 100  # least columns for progress bars
_STATE = max(map(len, _STYLES))  # characters of the longest state
_DETAIL = 16  # least columns of details beside aligned names


@dataclass
class Node:
    """One step and its display."""

    name: str
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)
    state: State = "waiting"
    latest: Shown | None = None  # the latest count
    note: str = ""  # shown after the step ends
    phase: tuple[int, str] = (-1, "")
    first: int = 0  # the count at the start of the phase, which does not count for the pace
    start: float = 0.0

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def label(self) -> str:
        """The name without words of the parent's name: `sample` below `train edt-s`."""
        words = self.parent.name.split() if self.parent is not None else []
        return " ".join(word for word in self.name.split() if word not in words) or self.name

    def count(self, latest: Shown) -> None:
        """Store the latest count. Another total or unit starts a new phase."""
        if self.state == "waiting":
            self.state = "running"
        self.latest = latest
        if self.phase != (latest.total, latest.note):
            self.phase, self.first, self.start = (latest.total, latest.note), latest.done, time.monotonic()

    def pace(self) -> str:
        """Rate and remaining time of the current phase; "" if they are unknown."""
        if self.latest is None:
            return ""
        number, seconds = self.latest.done - self.first, time.monotonic() - self.start
        if number <= 0 or seconds <= 0 or self.latest.done >= self.latest.total:
            return ""
        left = seconds / number * (self.latest.total - self.latest.done)
        return f"{number / seconds:.1f}/s, {clock(left)} left"

    def progress(self, room: int | None = None) -> str:
        """Count, pace and detail in one line, such as `240/600 steps, 5.3/s, 1:08 left, loss 0.43`.

        `room`: leave out parts from the end, but not the count, until the line has at most this many characters.
        """
        if self.latest is None:
            return ""
        count = f"{self.latest.done}/{self.latest.total} {self.latest.note}".strip()
        text = on_one_line(", ".join(part for part in (count, self.pace(), self.latest.detail) if part))
        while room is not None and len(text) > room and ", " in text:
            text = text.rpartition(", ")[0]
        return text


class StepTree:
    """All steps of a run in the order in which they were added."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def add(self, name: str, needs: Sequence[str] = ()) -> Node:
        """Add a step below the deepest of those it needs, the first one among equals, and return it."""
        candidates = [self.nodes[need] for need in needs if need in self.nodes]
        parent = max(candidates, key=lambda node: node.depth, default=None)
        node = self.nodes[name] = Node(name, parent)
        if parent is not None:
            parent.children.append(node)
        return node

    def get(self, name: str) -> Node:
        """The step of this name, added if it is new."""
        return self.nodes.get(name) or self.add(name)

    def remove(self, name: str) -> None:
        """Remove a step without children."""
        node = self.nodes.pop(name, None)
        if node is not None and node.parent is not None:
            node.parent.children.remove(node)

    def tally(self) -> str:
        """`5 of 12 steps done, 2 reused, 1 running, 1 failed`; "" before the first step is known."""
        states = [node.state for node in self.nodes.values() if node.name != SOURCE]
        if not states:
            return ""
        ended = sum(state in _ENDED for state in states)
        more = [f"{states.count(state)} {state}" for state in _TALLIED if state in states]
        return ", ".join([f"{ended} of {len(states)} steps done", *more])

    def lines(self, room: int) -> Iterator[tuple[str, Node]]:
        """(guides, step) from top to bottom. Without room for all, ended steps are omitted first, then waiting ones."""
        pairs = list(self._walk([node for node in self.nodes.values() if node.parent is None], ""))
        for hidden in ((), _ENDED, (*_ENDED, "waiting")):
            visible = [(guides, node) for guides, node in pairs if node.state not in hidden]
            if len(visible) <= room:
                break
        yield from visible[: max(room, 1)]

    def _walk(self, siblings: Collection[Node], guides: str) -> Iterator[tuple[str, Node]]:
        for number, node in enumerate(siblings, 1):
            last = number == len(siblings)
            root = node.parent is None
            yield guides if root else f"{guides}{'└' if last else '├'} ", node
            yield from self._walk(node.children, guides if root else f"{guides}{'  ' if last else '│ '}")

    def render(self, width: int, room: int, unicode: bool = True) -> "Text":
        """The tree for a screen of this many columns and rows.

        On a narrow screen details are left out from their end, then the columns are no longer aligned. Names are cut
        only if a name and a state do not fit.
        """
        from rich.text import Text

        listed = list(self.lines(room))
        names = [cut(_name(guides, node, unicode), max(width - _STATE - 2, 1), unicode) for guides, node in listed]
        widest = max((name.cell_len for name in names), default=0)
        if width - widest - _STATE - 4 < _DETAIL:
            widest = 0
        lines = []
        for line, (_, node) in zip(names, listed, strict=True):
            line.pad_right(max(widest - line.cell_len, 0) + 2)
            line.append(f"{node.state:<{_STATE}}", _STYLES[node.state])
            left = width - line.cell_len - 2
            line.append("  ").append_text(cut(_tail(node, left, width >= _WIDE, unicode), left, unicode))
            line.rstrip()
            lines.append(line)
        return Text("\n", no_wrap=True).join(lines)


def _name(guides: str, node: Node, unicode: bool) -> "Text":
    from rich.text import Text

    style = _STYLES[node.state]
    name = Text()
    name.append(guides if unicode else guides.translate(_PLAIN_GUIDES), "dim")
    name.append((_MARKS if unicode else _PLAIN_MARKS)[node.state], style)
    return name.append(f" {node.label}", style)


def cut(text: "Text", width: int, unicode: bool) -> "Text":
    """A text of at most this many columns. An ellipsis marks where it was cut."""
    if text.cell_len > width:
        text.truncate(max(width - 1, 0), overflow="crop")
        text.append(("…" if unicode else "~")[: max(width, 0)])
    return text


_PLAIN_GUIDES = str.maketrans("└├│", "`|:")


def _tail(node: Node, room: int, with_bar: bool, unicode: bool) -> "Text":
    """The right part of a step: bar and pace while it runs, its note afterwards."""
    from rich.text import Text

    if node.state != "running" or node.latest is None:
        return Text(on_one_line(node.note), "dim" if node.state in ("waiting", *_ENDED) else _STYLES[node.state])
    text = Text()
    if with_bar and node.latest.total:
        filled = min(_BAR, _BAR * node.latest.done // node.latest.total)
        text.append(("━" if unicode else "=") * filled, "cyan")
        text.append(("─" if unicode else "-") * (_BAR - filled) + " ", "dim")
    return text.append(node.progress(room - text.cell_len))


def clock(seconds: float) -> str:
    """`48 s`, `1:08`, `2:03:20`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
