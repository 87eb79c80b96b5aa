"""The board: an actor that stores what workers report until the waiting process has fetched it."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from edt_core.progress import Count

_INTERVAL_S = 0.5  # between two reports of a part, and between two checks whether to stop
_HAND_OVER_S = 0.2  # the longest that a worker waits for a busy board
_BATCH = 200  # reports per delivery


class Shown(NamedTuple):
    """Progress of one step, for display."""

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
    """All checkpoints that exist at one moment: step number -> (URI, digest)."""

    checkpoints: Mapping[int, tuple[str, str]]


@dataclass(frozen=True)
class Warned:
    """A warning of a job."""

    message: str


Report = Measured | Picture | Kept | Warned


class Board:
    """A Ray actor that stores the latest count of every step, the warnings, and whether the work should stop.

    A step's reports for its record wait here, in order, until they are delivered: none is lost when a worker or the
    delivering process ends. With `recorded` false nothing delivers them, and they are dropped.
    """

    def __init__(self, recorded: bool = True) -> None:
        self.recorded = recorded
        self.counts: dict[str, Count] = {}
        self.details: dict[str, str] = {}
        self.warnings: list[tuple[str, str]] = []
        self.reports: dict[str, list[Report]] = {}
        self.listening: set[str] = set()
        self.makers: dict[str, tuple[str, bool]] = {}
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
        """The oldest reports of a step. First drops the `delivered` oldest ones, which an earlier call returned."""
        queue = self.reports.setdefault(step, [])
        del queue[:delivered]
        return queue[:_BATCH]

    def made_by(self, step: str, maker: str, finished: bool = False) -> None:
        """Store which other run makes, or has made, the artifact of a step; "" if this run makes it after all."""
        self.makers[step] = (maker, finished)

    def made_elsewhere(self, finished: bool = False) -> dict[str, str]:
        """The steps whose artifacts other runs make, or have made, with these runs."""
        return {step: maker for step, (maker, ended) in self.makers.items() if maker and ended == finished}

    def stopping(self, step: str) -> bool:
        """Whether the work should stop. A step that calls this counts as one that can stop."""
        self.listening.add(step)
        return self.stop

    def ask_to_stop(self) -> None:
        self.stop = True

    def read(self) -> tuple[dict[str, Shown], list[tuple[str, str]], set[str]]:
        """Progress by step, the warnings so far, and the steps that can stop on request."""
        shown = {step: Shown(c.done, c.total, c.note, self.details[step]) for step, c in self.counts.items()}
        return shown, self.warnings, self.listening


class BoardProgress:
    """The `Progress` of one step, sent to a board. Picklable; each copy reports a part at most twice a second."""

    def __init__(self, step: str, board: Any) -> None:
        self.step, self.board = step, board
        self._reported_at: dict[int | None, float] = {}
        self._stop, self._queried_at = False, 0.0
        self._query: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_query": None}  # its answer goes to the process that sent it

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        if done == total or time.monotonic() - self._reported_at.get(part, 0.0) > _INTERVAL_S:
            self._reported_at[part] = time.monotonic()
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
        """Wait, but not for long, until the board has the report: a report in transit is lost with this process."""
        import ray

        ray.wait([self.board.report.remote(self.step, report)], timeout=_HAND_OVER_S)

    def stopping(self) -> bool:
        """The board's last answer. Queries the board at most twice a second; never waits or raises."""
        import ray
        import ray.exceptions

        if self._stop:
            return True
        with suppress(ray.exceptions.RayError):  # a lost board requests no stop
            if self._query is not None and ray.wait([self._query], timeout=0)[0]:
                answer, self._query = self._query, None
                self._stop = ray.get(answer)
            if self._query is None and time.monotonic() - self._queried_at > _INTERVAL_S:
                self._queried_at = time.monotonic()
                self._query = self.board.stopping.remote(self.step)
        return self._stop


def _now_ms() -> int:
    return int(time.time() * 1000)
