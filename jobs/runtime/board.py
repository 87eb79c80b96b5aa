"""The board: an actor that keeps what workers report, until the process that waits has fetched it."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from edt_core.progress import Count

_INTERVAL_S = 0.5  # between two reports of a part, and two questions whether to stop
_HAND_OVER_S = 0.2  # most that a worker waits for a busy board
_PARCEL = 200  # items that are handed out at once


class Shown(NamedTuple):
    """How far one step is, for the program that shows it."""

    done: int
    total: int
    note: str
    detail: str = ""


@dataclass(frozen=True)
class Measured:
    """Metrics of one step number, and when they were measured (ms since 1970)."""

    values: Mapping[str, float]
    step: int
    time_ms: int


@dataclass(frozen=True)
class Picture:
    """A PNG at a step number, and when it was made (ms since 1970)."""

    name: str
    png: bytes
    step: int
    time_ms: int


@dataclass(frozen=True)
class Kept:
    """All checkpoints that there were at one moment: step number -> (URI, digest)."""

    checkpoints: Mapping[int, tuple[str, str]]


@dataclass(frozen=True)
class Warned:
    """A warning of a job."""

    message: str


Report = Measured | Picture | Kept | Warned


class Board:
    """A Ray actor that keeps the latest count of every step, the warnings, and whether the work is to stop.

    What a step reported for its record waits here, in order, until it is delivered: neither the end of a worker nor
    that of the one who delivers loses any of it. With `recorded` false nobody delivers, and it is not kept.
    """

    def __init__(self, recorded: bool = True) -> None:
        self.recorded = recorded
        self.counts: dict[str, Count] = {}
        self.details: dict[str, str] = {}
        self.warnings: list[tuple[str, str]] = []
        self.reports: dict[str, list[Report]] = {}
        self.listening: set[str] = set()
        self.stop = False

    def update(self, step: str, done: int, total: int, note: str, part: int | None, detail: str = "") -> None:
        self.counts.setdefault(step, Count()).put(done, total, note, part)
        self.details[step] = detail

    def warn(self, step: str, message: str) -> None:
        self.warnings.append((step, message))
        self.report(step, Warned(message))

    def report(self, step: str, report: Report) -> None:
        if self.recorded:
            self.reports.setdefault(step, []).append(report)

    def waiting(self, step: str, delivered: int) -> list[Report]:
        """The oldest reports of a step, after the `delivered` first of those handed out before are forgotten."""
        queue = self.reports.setdefault(step, [])
        del queue[:delivered]
        return queue[:_PARCEL]

    def stopping(self, step: str) -> bool:
        """Whether the work is to stop; whoever asks is taken to be one that will."""
        self.listening.add(step)
        return self.stop

    def ask_to_stop(self) -> None:
        self.stop = True

    def read(self) -> tuple[dict[str, Shown], list[tuple[str, str]], set[str]]:
        """What to show by step, the warnings so far, and the steps that would stop if they were asked to."""
        shown = {step: Shown(c.done, c.total, c.note, self.details[step]) for step, c in self.counts.items()}
        return shown, self.warnings, self.listening


class BoardProgress:
    """The `Progress` of one step, told to a board. Picklable; each copy speaks at most twice a second of each part."""

    def __init__(self, step: str, board: Any) -> None:
        self.step, self.board = step, board
        self._told: dict[int | None, float] = {}
        self._stop, self._asked = False, 0.0
        self._question: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_question": None}  # an answer is for the process that asked

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        if done == total or time.monotonic() - self._told.get(part, 0.0) > _INTERVAL_S:
            self._told[part] = time.monotonic()
            self.board.update.remote(self.step, done, total, note, part, detail)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._hand_over(Measured(dict(values), step, _now_ms()))

    def image(self, name: str, png: bytes, step: int) -> None:
        self._hand_over(Picture(name, png, step, _now_ms()))

    def checkpoints(self, kept: Mapping[int, tuple[str, str]]) -> None:
        self._hand_over(Kept(dict(kept)))

    def warn(self, message: str) -> None:
        self.board.warn.remote(self.step, message)

    def _hand_over(self, report: Report) -> None:
        """Wait until the board has it: what is still on its way is lost with this process. Never for long."""
        import ray

        ray.wait([self.board.report.remote(self.step, report)], timeout=_HAND_OVER_S)

    def stopping(self) -> bool:
        """What the last answer of the board was; asks again at most twice a second, and never waits or raises."""
        import ray
        import ray.exceptions

        if self._stop:
            return True
        with suppress(ray.exceptions.RayError):  # a board that is gone asks nobody to stop
            if self._question is not None and ray.wait([self._question], timeout=0)[0]:
                answer, self._question = self._question, None
                self._stop = ray.get(answer)
            if self._question is None and time.monotonic() - self._asked > _INTERVAL_S:
                self._asked = time.monotonic()
                self._question = self.board.stopping.remote(self.step)
        return self._stop


def _now_ms() -> int:
    return int(time.time() * 1000)
