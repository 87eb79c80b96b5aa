"""Progress across processes: workers report to a Ray actor, and the waiting process displays the reports."""

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from edt_core.printing.console import say
from edt_core.progress import Printed, Progress
from jobs.runtime.board import Board, BoardProgress

_REDRAWN_S = 0.5  # the bar of a command
STOPPING = "stopping: training writes a checkpoint first; press Ctrl-C again to stop at once"


class Interrupts:
    """The effect of Ctrl-C while `handled`: the first one requests a stop from listening steps, a second one ends all.

    If no step listens, the first one raises KeyboardInterrupt too. The handler calls nothing, because it may interrupt
    any code. The process that follows the board sets the listening steps (`heard_by`) and forwards the request
    (`passed_on`).
    """

    def __init__(self) -> None:
        self.asked = False
        self.listening: frozenset[str] = frozenset()
        self._passed_on = False

    def heard_by(self, steps: Iterable[str]) -> None:
        """Set the running steps that can stop on request."""
        self.listening = frozenset(steps)

    def passed_on(self, board: Any) -> bool:
        """Forward a requested stop to the board, once. Returns True in the call that does."""
        if not self.asked or self._passed_on:
            return False
        self._passed_on = True
        board.ask_to_stop.remote()
        return True

    @contextmanager
    def handled(self) -> Iterator["Interrupts"]:
        """Handle SIGINT. Changes nothing in a thread other than the main one, where Python has no signals."""
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
    """A bar with rate and remaining time if standard error is a terminal; otherwise lines."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
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
            self._bars.add_task(self.title, total=total, completed=self.count.done, rate="")
        (task,) = self._bars.tasks
        rate = f"{note} {task.speed or 0:.0f}/s"
        self._bars.update(task.id, completed=self.count.done, rate=f"{rate}, {detail}" if detail else rate)


@contextmanager
def relayed(name: str, shown: Progress) -> Iterator[BoardProgress]:
    """A `Progress` for jobs whose workers are other processes; their reports are shown here.

    The first Ctrl-C requests a listening job to stop at a point from which it can resume.
    """
    import ray
    import ray.exceptions

    from jobs.runtime.cluster import start_beside

    board: Any = start_beside(Board, recorded=False)
    stop = threading.Event()
    interrupts = Interrupts()
    num_warnings = 0

    def show() -> None:
        nonlocal num_warnings
        counts, warnings, listening = ray.get(board.read.remote())
        interrupts.heard_by(listening)
        if interrupts.passed_on(board):
            say(STOPPING, err=True)
        for _, message in warnings[num_warnings:]:
            shown.warn(message)
        num_warnings = len(warnings)
        for count in counts.values():
            shown.update(count.done, count.total, count.note, detail=count.detail)

    def follow() -> None:
        while not stop.wait(_REDRAWN_S):
            with suppress(ray.exceptions.RayError):  # only the bar stops; the job continues, or raises its own error
                show()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        with interrupts.handled():
            yield BoardProgress(name, board)
    finally:
        stop.set()
        thread.join()
        with suppress(ray.exceptions.RayError):
            show()
        ray.kill(board)
