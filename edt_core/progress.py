"""What a job tells while it works. Jobs see only this; a terminal, MLflow or nothing stands behind it."""

import sys
import time
from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Counts, metrics and warnings of one job. Implementations are picklable: workers get a copy."""

    def update(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are finished."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Measured values at an explicit step."""

    def warn(self, message: str) -> None:
        """Something a person should read that does not stop the job."""


class Silent:
    """Tells nobody."""

    def update(self, done: int, total: int, note: str = "") -> None: ...

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def warn(self, message: str) -> None: ...


class Printed:
    """A line on standard error at most every `interval_s` seconds, for the verbs on their own."""

    def __init__(self, verb: str, interval_s: float = 5.0) -> None:
        self.verb, self.interval_s = verb, interval_s
        self._started = self._last = time.monotonic()

    def update(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last < self.interval_s and done < total:
            return
        self._last = now
        rate = done / max(now - self._started, 1e-9)
        left = (total - done) / rate if rate else 0.0
        print(f"{self.verb}: {done}/{total} {rate:.1f}/s, {left:.0f} s left {note}".rstrip(), file=sys.stderr)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        shown = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
        print(f"{self.verb}: step {step}: {shown}", file=sys.stderr)

    def warn(self, message: str) -> None:
        print(f"{self.verb}: warning: {message}", file=sys.stderr)
