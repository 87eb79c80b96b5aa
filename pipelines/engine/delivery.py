"""Delivery of a step's reports to its MLflow run, in a thread, so that no worker waits for MLflow."""

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
_OUTAGE_S = 10.0  # a longer outage causes a warning
_HTTP = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


class UndeliveredError(RuntimeError):
    """The reports of a step could not be written to MLflow."""


class Delivery:
    """Moves the reports of a step from the board to the step's run, in order, from entry to exit of its context.

    While the server is down, the reports wait on the board. The exit waits until all are delivered, at most
    `patience_s`. After that it raises UndeliveredError, or only warns if the step itself failed.
    """

    def __init__(self, board: Any, step: str, record: RunRecord, patience_s: float = PATIENCE_S) -> None:
        self.board, self.step, self.record, self.patience_s = board, step, record, patience_s
        self._batch: deque[Report] = deque()
        self._written = 0  # reports of the batch before, which the board may now drop
        self._closing, self._cancelled = threading.Event(), threading.Event()
        self._last_error: Exception | None = None
        self._thread = threading.Thread(target=self._follow, name=f"delivery of {step}", daemon=True)

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
        self._cancelled.set()
        if self._thread.is_alive() or self._last_error is not None:
            raise UndeliveredError(
                f"MLflow at {self.record.catalog.place} did not accept the whole record of {self.step!r} within "
                f"{self.patience_s:.0f} s ({self._last_error}). Repair the server and run again: finished artifacts "
                "are reused"
            )

    def _follow(self) -> None:
        pause, down_since = _INTERVAL_S, None
        while not self._cancelled.is_set():
            closing = self._closing.is_set()
            try:
                if not self._deliver_batch() and closing:
                    return
            except ray.exceptions.RayError as error:  # the board is gone, and the run with it
                self._last_error = error
                return
            except Exception as error:
                self._last_error = error
                down_since = self._warn_of_outage(down_since, error)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                self._last_error, down_since, pause = None, None, _INTERVAL_S
            if self._last_error is not None:
                self._cancelled.wait(pause)
            elif not self._batch:
                self._closing.wait(pause)

    def _deliver_batch(self) -> bool:
        """Deliver the oldest reports. False if there were none. Raises MLflow's error while the server is down."""
        if not self._batch:
            written, self._written = self._written, 0
            self._batch.extend(ray.get(self.board.waiting.remote(self.step, written)))
        has_reports = bool(self._batch)
        while self._batch:
            kind = type(self._batch[0])
            group = list(takewhile(lambda report: type(report) is kind, self._batch))  # noqa: B023  used here only
            if kind is Picture:
                group = group[:1]
            self._deliver(group)
            for _ in group:
                self._batch.popleft()
            self._written += len(group)
        return has_reports

    def _deliver(self, group: list[Report]) -> None:
        """Write reports of one kind. A report that MLflow rejects causes a warning and is skipped."""
        try:
            self._write(group)
        except Exception as error:
            if not is_refused(error):
                raise
            if len(group) > 1:
                for half in (group[: len(group) // 2], group[len(group) // 2 :]):
                    self._deliver(half)
            elif not isinstance(group[0], Warned):
                self.board.warn.remote(self.step, f"MLflow rejected a {type(group[0]).__name__}: {error}")

    def _write(self, group: list[Report]) -> None:
        first, last = group[0], group[-1]
        if isinstance(first, Measured):
            self.record.metrics([report for report in group if isinstance(report, Measured)])
        elif isinstance(first, Picture):
            self.record.picture(first)
        elif isinstance(last, Kept):  # each lists all checkpoints: only the newest counts
            self.record.checkpoints(last.checkpoints)
        else:
            self.record.warnings(report.message for report in group if isinstance(report, Warned))

    def _warn_of_outage(self, since: float | None, error: Exception) -> float:
        """Warn once per outage. `since` and the result: when the outage began, or inf after the warning."""
        if since is None:
            return time.monotonic()
        if time.monotonic() - since < _OUTAGE_S:
            return since
        text = f"MLflow at {self.record.catalog.place} does not answer; metrics are delivered when it does ({error})"
        self.board.warn.remote(self.step, text)
        return float("inf")


def is_refused(error: Exception) -> bool:
    """Whether MLflow rejects the request for good, so that a retry is useless."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"


def with_patience(call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Call MLflow until it answers, for at most `patience_s`. Raises its error after that, or if it rejects the call.

    The call must be safe to repeat: MLflow may have executed a call whose answer was lost.
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
    """Limit MLflow's client to one retry. By default it retries for minutes and does not notice the server's return.

    Values that the environment sets already are not changed.
    """
    ours = {key: value for key, value in _HTTP.items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            with suppress(KeyError):
                del os.environ[key]
