"""Progress across processes: workers report to a Ray actor, and the process that waits shows what it holds."""

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from edt_core.printing.console import say
from edt_core.progress import Count, Printed, Progress

_INTERVAL_S = 0.5
_HAND_OVER_S = 0.2  # most that a worker waits for a busy board
_PARCEL = 200  # items that are handed out at once
STOPPING = "stopping: the training writes a checkpoint; Ctrl-C again to stop at once"


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


class Interrupts:
    """What Ctrl-C does while `handled`: the first asks those who listen to stop, a second one ends everything.

    Where nobody listens, the first one is a KeyboardInterrupt as well. The handler calls nothing: it may run in the
    middle of anything. Whoever follows the board says who listens (`heard_by`) and passes the wish on (`passed_on`).
    """

    def __init__(self) -> None:
        self.asked = False
        self.listening: frozenset[str] = frozenset()
        self._passed_on = False

    def heard_by(self, steps: Iterable[str]) -> None:
        """The steps at work that would stop."""
        self.listening = frozenset(steps)

    def passed_on(self, board: Any) -> bool:
        """Tell the board, once, that the work is to stop. True in the one call that does."""
        if not self.asked or self._passed_on:
            return False
        self._passed_on = True
        board.ask_to_stop.remote()
        return True

    @contextmanager
    def handled(self) -> Iterator["Interrupts"]:
        """Handle SIGINT; in a thread other than the main one, where Python has no signals, change nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, *_: object) -> None:
        if self.asked or not self.listening:
            raise KeyboardInterrupt
        self.asked = True


class Bar(Printed):
    """A bar with rate and time left where standard error is a terminal; lines elsewhere."""

    def __init__(self, verb: str) -> None:
        super().__init__(verb)
        self._bars: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}", markup=False), BarColumn(30), MofNCompleteColumn())
            columns += (TextColumn("{task.fields[rate]}", markup=False), TimeRemainingColumn())  # type: ignore[assignment]
            self._bars = Bars(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "Bar":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        if self._bars is None:
            super().update(done, total, note, part, detail)
            return
        if self.count.put(done, total, note, part) or not self._bars.tasks:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._bars.add_task(self.verb, total=total, completed=self.count.done, rate="")
        (task,) = self._bars.tasks
        rate = f"{note} {task.speed or 0:.0f}/s"
        self._bars.update(task.id, completed=self.count.done, rate=f"{rate}, {detail}" if detail else rate)


@contextmanager
def relayed(verb: str, shown: Progress) -> Iterator[BoardProgress]:
    """A `Progress` for jobs whose workers are other processes; what they tell is shown here.

    The first Ctrl-C asks a job that listens to stop at a point from which it can resume.
    """
    import ray
    import ray.exceptions

    from jobs.runtime.cluster import start_beside

    board: Any = start_beside(Board, recorded=False)
    stop = threading.Event()
    interrupts = Interrupts()
    warned = 0

    def show() -> None:
        nonlocal warned
        counts, warnings, listening = ray.get(board.read.remote())
        interrupts.heard_by(listening)
        if interrupts.passed_on(board):
            say(STOPPING, err=True)
        for _, message in warnings[warned:]:
            shown.warn(message)
        warned = len(warnings)
        for count in counts.values():
            shown.update(count.done, count.total, count.note, detail=count.detail)

    def follow() -> None:
        while not stop.wait(_INTERVAL_S):
            with suppress(ray.exceptions.RayError):  # the bar may stop; the job, and its own error, go on
                show()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        with interrupts.handled():
            yield BoardProgress(verb, board)
    finally:
        stop.set()
        thread.join()
        with suppress(ray.exceptions.RayError):
            show()
        ray.kill(board)
