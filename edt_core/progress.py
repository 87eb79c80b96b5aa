"""Progress of a job. Jobs use only this interface; implementations report to a terminal, to MLflow, or nowhere."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from edt_core.printing.console import say


class Progress(Protocol):
    """Counts, metrics and warnings of one job. Implementations are picklable: workers get a copy."""

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        """Report that `done` of `total` units (named by `note`) are finished; `detail` adds a value such as the loss.

        If several tasks share the units, `part` identifies the task: the counts of all parts are added up.
        """

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Report measured values at an explicit step."""

    def image(self, name: str, png: bytes, step: int) -> None:
        """Report an image at an explicit step."""

    def checkpoints(self, kept: Mapping[int, tuple[str, str]]) -> None:
        """Report all current checkpoints: step -> (URI of the folder, digest of its manifest)."""

    def warn(self, message: str) -> None:
        """Report a warning, which does not stop the job."""

    def stopping(self) -> bool:
        """Whether the job should stop at the next point from which it can resume. Cheap: it makes no request."""


class Silent:
    """Reports nothing."""

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None: ...

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, png: bytes, step: int) -> None: ...

    def checkpoints(self, kept: Mapping[int, tuple[str, str]]) -> None: ...

    def warn(self, message: str) -> None: ...

    def stopping(self) -> bool:
        return False


@dataclass
class CollectedWarnings(Silent):
    """Collects warnings in a list."""

    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@dataclass
class Counts(Silent):
    """Forwards counts, but no warnings."""

    progress: Progress

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        self.progress.update(done, total, note, part, detail)


@dataclass
class Count:
    """Finished units, added up over the parts of one phase of a job; another `total` or `note` starts a new phase."""

    total: int = 0
    note: str = ""
    parts: dict[int | None, int] = field(default_factory=dict)

    def put(self, done: int, total: int, note: str, part: int | None) -> bool:
        """Record a count; return whether it starts a phase. A part never decreases: messages may arrive late."""
        is_new_phase = (total, note) != (self.total, self.note)
        if part is None or is_new_phase:
            self.parts.clear()
        self.total, self.note = total, note
        self.parts[part] = max(done, self.parts.get(part, 0))
        return is_new_phase

    @property
    def done(self) -> int:
        return sum(self.parts.values())


def fit_report(progress: Progress, steps: int, name: str, digits: int) -> Callable[[int, float], None]:
    """The callback of a small fit for each step and its error: counts steps, records every fiftieth and the last."""

    def report(step: int, value: float) -> None:
        progress.update(step, steps, "steps", detail=f"{name} {value:.{digits}f}")
        if step % 50 == 0 or step == steps:
            progress.metrics({name: value}, step)

    return report


class Printed(Silent):
    """Prints a line to standard error at most every `interval_s` seconds, for a single command."""

    def __init__(self, title: str, interval_s: float = 5.0) -> None:
        self.title, self.interval_s = title, interval_s
        self.count = Count()
        self._started = self._last = time.monotonic()
        self._first = 0

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        now = time.monotonic()
        is_new_phase = self.count.put(done, total, note, part)
        done = self.count.done
        if is_new_phase:
            self._started, self._first, self._last = now, done, now
        if now - self._last < self.interval_s:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._started, 1e-9)  # without units that an earlier run finished
        left = (total - done) / rate if rate else 0.0
        line = f"{self.title}: {done}/{total} {note}, {rate:.1f}/s, {left:.0f} s left"
        say(f"{line}, {detail}" if detail else line, err=True)

    def warn(self, message: str) -> None:
        say(f"{self.title}: warning: {message}", err=True)
