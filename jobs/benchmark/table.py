"""The result of a benchmark: rows, and the hardware of the measurement."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edt_core.environment import code_version, environment


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` compares `figure` with `against`."""

    what: str
    figure: str
    against: str = ""
    ratio: float | None = None
    target: str = ""


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes."""
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


def mib(size: int) -> str:
    """Bytes, in MiB."""
    return f"{size / (1 << 20):,.0f} MiB"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | measured | against | ratio | target |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.what} | {row.figure} | {row.against} | {ratio} | {row.target} |")
    return "\n".join(lines)


def hardware() -> str:
    """The hardware, the versions and the commit of the measurement."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line for line in lines if "model name" in line), ": CPU")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no accelerator"
    versions = {name: number for name, number in environment().items() if name in ("python", "torch", "ray", "pillow")}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{os.cpu_count()} cores ({cpu.split(':')[1].strip()}){gpu}; {listed}; commit {code_version()[:12]}"
