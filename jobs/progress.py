"""Progress across processes: workers report to a Ray actor, and whoever waits shows what it holds."""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from edt_core.progress import Count, Printed, Progress

_INTERVAL_S = 0.5


class Board:
    """A Ray actor that keeps the latest count of every step, and warnings and metrics in order."""

    def __init__(self) -> None:
        self.counts: dict[str, Count] = {}
        self.warnings: list[tuple[str, str]] = []
        self.measured: list[tuple[str, Mapping[str, float], int]] = []

    def update(self, step: str, done: int, total: int, note: str, part: int | None) -> None:
        self.counts.setdefault(step, Count()).put(done, total, note, part)

    def warn(self, step: str, message: str) -> None:
        self.warnings.append((step, message))

    def metrics(self, step: str, values: Mapping[str, float], at: int) -> None:
        self.measured.append((step, values, at))

    def read(self) -> tuple[dict[str, tuple[int, int, str]], list[tuple[str, str]]]:
        """(done, total, note) by step, and the warnings so far."""
        return {step: (count.done, count.total, count.note) for step, count in self.counts.items()}, self.warnings

    def take_metrics(self) -> list[tuple[str, Mapping[str, float], int]]:
        """The metrics since the last call."""
        taken, self.measured = self.measured, []
        return taken


class BoardProgress:
    """The `Progress` of one step, told to a board. Picklable; each copy speaks at most twice a second of each part."""

    def __init__(self, step: str, board: Any) -> None:
        self.step, self.board = step, board
        self._told: dict[int | None, float] = {}

    def update(self, done: int, total: int, note: str = "", part: int | None = None) -> None:
        if done == total or time.monotonic() - self._told.get(part, 0.0) > _INTERVAL_S:
            self._told[part] = time.monotonic()
            self.board.update.remote(self.step, done, total, note, part)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.board.metrics.remote(self.step, values, step)

    def warn(self, message: str) -> None:
        self.board.warn.remote(self.step, message)


class Bar(Printed):
    """A bar with rate and time left where standard error is a terminal; lines elsewhere."""

    def __init__(self, verb: str) -> None:
        super().__init__(verb)
        self._bars: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn())
            columns += (TextColumn("{task.fields[rate]}"), TimeRemainingColumn())  # type: ignore[assignment]
            self._bars = Bars(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "Bar":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, done: int, total: int, note: str = "", part: int | None = None) -> None:
        if self._bars is None:
            super().update(done, total, note, part)
            return
        if self.count.put(done, total, note, part) or not self._bars.tasks:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._bars.add_task(self.verb, total=total, rate="")
        (task,) = self._bars.tasks
        self._bars.update(task.id, completed=self.count.done, rate=f"{note} {task.speed or 0:.0f}/s")


@contextmanager
def relayed(verb: str, shown: Progress) -> Iterator[BoardProgress]:
    """A `Progress` for jobs whose workers are other processes; what they tell is shown here."""
    import ray
    import ray.exceptions

    board: Any = ray.remote(Board).options(num_cpus=0).remote()
    stop = threading.Event()
    warned = 0

    def show() -> None:
        nonlocal warned
        counts, warnings = ray.get(board.read.remote())
        for _, message in warnings[warned:]:
            shown.warn(message)
        warned = len(warnings)
        for _, values, step in ray.get(board.take_metrics.remote()):
            shown.metrics(values, step)
        for done, total, note in counts.values():
            shown.update(done, total, note)

    def follow() -> None:
        while not stop.wait(_INTERVAL_S):
            with suppress(ray.exceptions.RayError):  # the bar may stop; the job, and its own error, go on
                show()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield BoardProgress(verb, board)
    finally:
        stop.set()
        thread.join()
        with suppress(ray.exceptions.RayError):
            show()
        ray.kill(board)
