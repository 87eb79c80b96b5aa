"""Delivery of what a step reports to its MLflow run, by a thread that no worker waits for."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any, TypeVar

import ray
import ray.exceptions

from jobs.runtime.board import Kept, Measured, Picture, Report, Warned
from pipelines.tracking.run_record import RunRecord

T = TypeVar("T")

PATIENCE_S = 600.0  # how long the end of a step waits for a server that is down
_INTERVAL_S = 0.5
_LONGEST_PAUSE_S = 5.0
_OUTAGE_S = 10.0  # a server that is down for longer is worth a warning
_HTTP = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


class UndeliveredError(RuntimeError):
    """What a step reported could not be written to MLflow."""


class Delivery:
    """Takes what a step reported from the board to the step's run, in order, from entry to exit of its context.

    While the server is down everything waits on the board. The exit waits until all is delivered, for `patience_s` at
    most, and then raises UndeliveredError, or, where the step failed itself, leaves a warning.
    """

    def __init__(self, board: Any, step: str, record: RunRecord, patience_s: float = PATIENCE_S) -> None:
        self.board, self.step, self.record, self.patience_s = board, step, record, patience_s
        self._parcel: deque[Report] = deque()
        self._written = 0  # of the parcel before, for the board to forget
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._trouble: Exception | None = None
        self._thread = threading.Thread(target=self._follow, name=f"shipper of {step}", daemon=True)

    def __enter__(self) -> "Delivery":
        self._thread.start()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UndeliveredError as error:
            if failed is None:
                raise
            self.board.warn.remote(self.step, str(error))

    def close(self) -> None:
        """Wait until everything is delivered. Raises UndeliveredError."""
        self._closing.set()
        self._thread.join(self.patience_s)
        self._given_up.set()
        if self._thread.is_alive() or self._trouble is not None:
            raise UndeliveredError(
                f"MLflow at {self.record.catalog.place} did not take all of the record of {self.step!r} in "
                f"{self.patience_s:.0f} s ({self._trouble}); see to the server and run again: what is made is kept"
            )

    def _follow(self) -> None:
        pause, away_since = _INTERVAL_S, None
        while not self._given_up.is_set():
            closing = self._closing.is_set()
            try:
                if not self._ship() and closing:
                    return
            except ray.exceptions.RayError as error:  # the board is gone, and the run with it
                self._trouble = error
                return
            except Exception as error:
                self._trouble = error
                away_since = self._warn_of_outage(away_since, error)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                self._trouble, away_since, pause = None, None, _INTERVAL_S
            if self._trouble is not None:
                self._given_up.wait(pause)
            elif not self._parcel:
                self._closing.wait(pause)

    def _ship(self) -> bool:
        """Deliver the oldest reports. False where there were none; raises what MLflow raises while it is down."""
        if not self._parcel:
            written, self._written = self._written, 0
            self._parcel.extend(ray.get(self.board.waiting.remote(self.step, written)))
        there = bool(self._parcel)
        while self._parcel:
            kind = type(self._parcel[0])
            group = list(takewhile(lambda report: type(report) is kind, self._parcel))  # noqa: B023  used here only
            if kind is Picture:
                group = group[:1]
            self._deliver(group)
            for _ in group:
                self._parcel.popleft()
            self._written += len(group)
        return there

    def _deliver(self, group: list[Report]) -> None:
        """Write reports of one kind. What MLflow refuses for good is told and left out, so that the rest continues."""
        try:
            self._write(group)
        except Exception as error:
            if not is_refused(error):
                raise
            if len(group) > 1:
                for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                    self._deliver(half)
            elif not isinstance(group[0], Warned):
                self.board.warn.remote(self.step, f"MLflow refuses a {type(group[0]).__name__}: {error}")

    def _write(self, group: list[Report]) -> None:
        first, last = group[0], group[-1]
        if isinstance(first, Measured):
            self.record.metrics([report for report in group if isinstance(report, Measured)])
        elif isinstance(first, Picture):
            self.record.picture(first)
        elif isinstance(last, Kept):  # each says all that there is: only the newest counts
            self.record.checkpoints(last.checkpoints)
        else:
            self.record.warnings(report.message for report in group if isinstance(report, Warned))

    def _warn_of_outage(self, since: float | None, error: Exception) -> float:
        """Report, once an outage, that the server is down. `since` is when it began, inf once it is told."""
        if since is None:
            return time.monotonic()
        if time.monotonic() - since < _OUTAGE_S:
            return since
        text = f"MLflow at {self.record.catalog.place} does not answer; metrics wait until it does ({error})"
        self.board.warn.remote(self.step, text)
        return float("inf")


def is_refused(error: Exception) -> bool:
    """Whether MLflow will never take it, however often it is tried."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"


def with_patience(call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Call MLflow until it answers, for `patience_s` at most; then, or where it refuses, its error is raised.

    The call must be one that can be repeated: that an answer is lost does not say that nothing was done.
    """
    from mlflow.exceptions import MlflowException

    until, pause = time.monotonic() + patience_s, _INTERVAL_S
    while True:
        try:
            return call()
        except (MlflowException, OSError) as error:
            if is_refused(error) or time.monotonic() > until:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


@contextmanager
def quick_http() -> Iterator[None]:
    """Have MLflow's client give up on a server after one retry: it would try for minutes, and not notice its return.

    What the environment says already stands.
    """
    ours = {key: value for key, value in _HTTP.items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            with suppress(KeyError):
                del os.environ[key]
