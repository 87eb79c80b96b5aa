"""A pytest plugin: wall and processor seconds of the tests by file.

    python -m pytest -p tests.benchmarks.durations -n logical -m "not slow and not ray"
    python -m pytest -p tests.benchmarks.durations -m "not slow and ray"

Processor seconds are those of the process and of its children that have ended; without pytest-xdist those of the whole
machine, in which Ray's workers are: run nothing beside it.
"""

import os
import resource
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_WALL: Counter[str] = Counter()
_PROCESSOR: Counter[str] = Counter()


def processor_seconds() -> float:
    if "PYTEST_XDIST_WORKER" in os.environ:
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(one.ru_utime + one.ru_stime for one in used)
    user, nice, system, _idle, _wait, irq, softirq, *_ = Path("/proc/stat").read_text().split()[1:11]
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


_before = processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Each phase of a test takes what was used since the one before; xdist carries the number to the controller."""
    global _before
    report = yield
    now = processor_seconds()
    report.processor_s, _before = now - _before, now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    _WALL[file] += report.duration
    _PROCESSOR[file] += getattr(report, "processor_s", 0.0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("seconds by file: wall, processor")
    for file, seconds in _WALL.most_common():
        if seconds >= 1:
            terminalreporter.write_line(f"{seconds:8.1f} {_PROCESSOR[file]:8.1f}  {file}")
    terminalreporter.write_line(f"{sum(_WALL.values()):8.1f} {sum(_PROCESSOR.values()):8.1f}  all")
