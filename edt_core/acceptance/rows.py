"""The rows of an acceptance: printed as they come and written at once, each task within its time and memory."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from edt_core.printing.console import on_one_line, say

CORRECTNESS = "A"  # a failed row of this section is a failed acceptance
_LEAST_S = 1.0  # a task is not started with less time
_GIB = 1 << 30


@dataclass(frozen=True)
class Measure:
    """One figure. `passed` is None for a figure without a bound, and for one that could not be measured."""

    name: str
    value: float | None
    unit: str = ""
    bound: str = ""
    passed: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A measure in the report, with its section and the seconds that it took."""

    section: str
    name: str
    value: float | None
    unit: str
    bound: str
    passed: bool | None
    seconds: float
    note: str


@dataclass(frozen=True)
class Task:
    """Some rows that are computed together.

    seconds: about what it takes; with less time left in its section it is skipped.
    gib: device memory that it needs; with less free it is skipped.
    may_run_out: whether running out of memory is an expected result.
    """

    name: str
    run: Callable[[], Iterator[Measure]]
    seconds: float = 0.0
    gib: float = 0.0
    may_run_out: bool = False


def figure(name: str, value: float, unit: str = "", note: str = "") -> Measure:
    """A figure without a bound."""
    return Measure(name, value, unit, note=note)


def at_most(name: str, value: float, bound: float, unit: str = "", note: str = "") -> Measure:
    """A figure that must not be above a bound; NaN does not pass."""
    return Measure(name, value, unit, f"<= {bound:g}", value <= bound, note)


def at_least(name: str, value: float, bound: float, unit: str = "", note: str = "") -> Measure:
    """A figure that must not be below a bound; NaN does not pass."""
    return Measure(name, value, unit, f">= {bound:g}", value >= bound, note)


@dataclass
class Report:
    """The rows so far. With `out`, the file always has all of them: it is replaced after each row."""

    head: dict[str, Any]
    out: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def add(self, section: str, measure: Measure, seconds: float) -> None:
        """Print a row and write it."""
        row = Row(section=section, seconds=round(seconds, 3), **asdict(measure))
        self.rows.append(row)
        say(line(row))
        self.write()

    def write(self) -> None:
        """Replace the file."""
        if self.out is None:
            return
        text = json.dumps({**self.head, "rows": [_plain(row) for row in self.rows]}, indent=1, allow_nan=False)
        beside = self.out.with_name(f".{self.out.name}.{os.getpid()}")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(self.out)

    @property
    def failed(self) -> list[Row]:
        """Rows of correctness that did not pass."""
        return [row for row in self.rows if row.section == CORRECTNESS and row.passed is False]

    @property
    def not_measured(self) -> int:
        """Number of rows of correctness that were skipped or stopped."""
        return sum(row.section == CORRECTNESS and row.passed is None and row.value is None for row in self.rows)

    def summary(self) -> str:
        """How many rows passed, failed and were not measured."""
        parts = []
        for section in dict.fromkeys(row.section for row in self.rows):
            rows = [row for row in self.rows if row.section == section]
            counts = {
                "passed": sum(row.passed is True for row in rows),
                "failed": sum(row.passed is False for row in rows),
                "measured": sum(row.passed is None and row.value is not None for row in rows),
                "not measured": sum(row.passed is None and row.value is None for row in rows),
            }
            parts.append(f"{section}: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count))
        return "; ".join(parts)


def _plain(row: Row) -> dict[str, Any]:
    """The fields for JSON, which has no infinity and no NaN."""
    values = asdict(row)
    if row.value is not None and not math.isfinite(row.value):
        values.update(value=None, note=f"{row.value}; {row.note}".rstrip("; "))
    return values


def line(row: Row) -> str:
    """A row of the table."""
    value = "-" if row.value is None else f"{row.value:,.1f}" if 1000 <= abs(row.value) < 1e9 else f"{row.value:.4g}"
    state = {True: "ok", False: "FAIL", None: "-" if row.value is None else ""}[row.passed]
    figures = f"{row.section}  {row.name:<60} {value:>10} {row.unit:<9} {row.bound:<9} {state:<4} {row.seconds:6.1f} s"
    return on_one_line(f"{figures}  {row.note}".rstrip())


class OverTime(BaseException):
    """A task's time is up. Not an Exception: a compiler continues after any Exception."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Context that raises OverTime in the main thread after some seconds; in another thread it has no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OverTime

    started, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    before, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:  # the caller's clock continues
            signal.setitimer(signal.ITIMER_REAL, max(before - (time.monotonic() - started), 0.01))


def run_task(section: str, task: Task, report: Report, deadline: float, device: torch.device) -> None:
    """Add the rows of a task, or one row that states why they could not be measured."""
    started, passed = time.monotonic(), None
    reason = _obstacle(task, deadline - started, device)
    if reason is None:
        reason, passed = _attempt(section, task, report, deadline)
    if reason is not None:
        report.add(section, Measure(task.name, None, passed=passed, note=reason), time.monotonic() - started)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled graphs refer to models
    if device.type == "cuda":
        gc.collect()
        with suppress(RuntimeError):  # after an illegal access every call of CUDA fails
            torch.cuda.empty_cache()


def _obstacle(task: Task, left_s: float, device: torch.device) -> str | None:
    """Why a task is not even started."""
    if left_s < max(task.seconds, _LEAST_S):
        return f"skipped: it takes about {max(task.seconds, _LEAST_S):.0f} s, {max(left_s, 0):.0f} s are left"
    free = free_bytes(device)
    if free is not None and free < task.gib * _GIB and not task.may_run_out:
        return f"skipped: it needs {task.gib:.3g} GiB, {free / _GIB:.3g} GiB are free"
    return None


def _attempt(section: str, task: Task, report: Report, deadline: float) -> tuple[str | None, bool | None]:
    """Run a task. Why it ended early, and False if that is a failure."""
    last = time.monotonic()
    try:
        with time_limit(deadline - last):
            for measure in task.run():
                now = time.monotonic()
                report.add(section, measure, now - last)
                last = now
    except OverTime:
        return "stopped: the time of its section is up", None
    except Exception as error:
        if out_of_memory(error):
            return ("out of memory, as expected", True) if task.may_run_out else ("out of memory", False)
        return f"{type(error).__name__}: {_first_line(error)}", False
    return None, None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; of a CPU, what Linux calls available. None if it is unknown."""
    if device.type == "cuda":
        try:
            return torch.cuda.mem_get_info(device)[0]
        except RuntimeError:  # the task itself will say why
            return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(row.split()[1]) << 10 for row in lines if row.startswith("MemAvailable:")), None)
