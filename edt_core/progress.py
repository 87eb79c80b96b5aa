"""What a job tells while it works. Jobs see only this; a terminal, MLflow or nothing stands behind it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from edt_core.printing.console import say


class Progress(Protocol):
    """Counts, metrics and warnings of one job. Implementations are picklable: workers get a copy."""

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        """`done` of `total` units (`note` names them) are finished; `detail` is a word on how it goes, as the loss.

        Where several tasks share the units, `part` says whose `done` it is: those of all parts are added up.
        """

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Measured values at an explicit step."""

    def image(self, name: str, png: bytes, step: int) -> None:
        """A picture at an explicit step."""

    def checkpoints(self, kept: Mapping[int, tuple[str, str]]) -> None:
        """All checkpoints that there are now: step -> (URI of the folder, digest of its manifest)."""

    def warn(self, message: str) -> None:
        """Something a person should read that does not stop the job."""

    def stopping(self) -> bool:
        """Whether the job is asked to stop, at a point from which it can resume. Cheap: nothing is looked up."""


class Silent:
    """Tells nobody."""

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None: ...

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, png: bytes, step: int) -> None: ...

    def checkpoints(self, kept: Mapping[int, tuple[str, str]]) -> None: ...

    def warn(self, message: str) -> None: ...

    def stopping(self) -> bool:
        return False


@dataclass
class CollectedWarnings(Silent):
    """Keeps what it is warned of."""

    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@dataclass
class Counts(Silent):
    """Passes counts on, and no warnings."""

    progress: Progress

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        self.progress.update(done, total, note, part, detail)


@dataclass
class Count:
    """Units done, added up over the parts of one phase of a job; another `total` or `note` begins a new phase."""

    total: int = 0
    note: str = ""
    parts: dict[int | None, int] = field(default_factory=dict)

    def put(self, done: int, total: int, note: str, part: int | None) -> bool:
        """Returns whether a phase begins. A part never goes back: messages of workers may arrive late."""
        begins = (total, note) != (self.total, self.note)
        if part is None or begins:
            self.parts.clear()
        self.total, self.note = total, note
        self.parts[part] = max(done, self.parts.get(part, 0))
        return begins

    @property
    def done(self) -> int:
        return sum(self.parts.values())


def fit_report(progress: Progress, steps: int, name: str, digits: int) -> Callable[[int, float], None]:
    """What a small fit calls after each step with its error: counts steps, and keeps every fiftieth and the last."""

    def report(step: int, value: float) -> None:
        progress.update(step, steps, "steps", detail=f"{name} {value:.{digits}f}")
        if step % 50 == 0 or step == steps:
            progress.metrics({name: value}, step)

    return report


class Printed(Silent):
    """A line on standard error at most every `interval_s` seconds, for a command on its own."""

    def __init__(self, title: str, interval_s: float = 5.0) -> None:
        self.title, self.interval_s = title, interval_s
        self.count = Count()
        self._started = self._last = time.monotonic()
        self._first = 0

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        now = time.monotonic()
        begins = self.count.put(done, total, note, part)
        done = self.count.done
        if begins:
            self._started, self._first, self._last = now, done, now
        if now - self._last < self.interval_s:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._started, 1e-9)  # what an earlier run finished is no speed
        left = (total - done) / rate if rate else 0.0
        line = f"{self.title}: {done}/{total} {note}, {rate:.1f}/s, {left:.0f} s left"
        say(f"{line}, {detail}" if detail else line, err=True)

    def warn(self, message: str) -> None:
        say(f"{self.title}: warning: {message}", err=True)
