"""A pytest plugin: wall and processor seconds of the tests by file, and what memory each file leaves behind.

    python -m pytest -p tests.benchmarks.durations -n logical -m "not slow and not ray"
    python -m pytest -p tests.benchmarks.durations -m "not slow and ray"

Processor seconds are those of the process and of its children that have ended; without pytest-xdist those of the whole
machine, in which Ray's workers are: run nothing beside it. Memory is by how much a file's tests made their process
grow, in MiB, and the process's size after the last of them.
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
_GROWTH: Counter[str] = Counter()  # MiB
_SIZE: dict[str, int] = {}  # MiB, of the process after the file's last test


def processor_seconds() -> float:
    if "PYTEST_XDIST_WORKER" in os.environ:
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(one.ru_utime + one.ru_stime for one in used)
    user, nice, system, _idle, _wait, irq, softirq, *_ = Path("/proc/stat").read_text().split()[1:11]
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def resident_mib() -> int:
    """As the kernel has it, without a call that a test may have replaced."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


_before = processor_seconds()
_size = resident_mib()


def pytest_collection_finish() -> None:
    """What all tests import is of no file."""
    global _before, _size
    _before, _size = processor_seconds(), resident_mib()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Each phase of a test takes what was used since the one before; xdist carries the number to the controller."""
    global _before, _size
    report = yield
    now, size = processor_seconds(), resident_mib()
    report.processor_s, _before = now - _before, now
    report.growth_mib, _size = size - _size, size
    report.resident_mib = size
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    _WALL[file] += report.duration
    _PROCESSOR[file] += getattr(report, "processor_s", 0.0)
    _GROWTH[file] += getattr(report, "growth_mib", 0)
    _SIZE[file] = getattr(report, "resident_mib", 0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("by file: seconds of wall and processor, MiB of growth and size")
    for file, seconds in _WALL.most_common():
        if seconds >= 1 or _GROWTH[file] >= 50:
            size = f"{_GROWTH[file]:7d} {_SIZE[file]:7d}"
            terminalreporter.write_line(f"{seconds:8.1f} {_PROCESSOR[file]:8.1f} {size}  {file}")
    terminalreporter.write_line(f"{sum(_WALL.values()):8.1f} {sum(_PROCESSOR.values()):8.1f}  all")
