"""The command: sections in order, each within its share of the time."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from edt_core.acceptance import correctness, exactness, feeding, kernels, sampling, speed
from edt_core.acceptance.authors import MODELS_FILE
from edt_core.acceptance.machine import machine
from edt_core.acceptance.rows import Report, Task, run_task
from edt_core.acceptance.subjects import Setting
from edt_core.errors import UserError
from edt_core.printing.console import say

FORMAT = 1  # of the file
_BUDGET_S = 540.0
_SMALL = 0.02  # scale on a CPU


@dataclass(frozen=True)
class Section:
    """A part of the acceptance, with its share of the time."""

    title: str
    share: float
    tasks: Callable[[Setting], Iterator[Task]]


def _correctness(setting: Setting) -> Iterator[Task]:
    return chain(correctness.tasks(setting), exactness.tasks(setting), correctness.compiled_tasks(setting))


SECTIONS = {
    "A": Section("correctness", 110, _correctness),
    "B": Section("kernels", 30, kernels.tasks),
    "C": Section("speed of training", 240, speed.tasks),
    "D": Section("sampling and decoding", 90, sampling.tasks),
    "E": Section("feeding", 45, feeding.tasks),
}


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser for the arguments of `main`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Prove the code on a GPU machine, and measure it. Exit code 1 if a row of correctness fails, "
        "3 if some were not measured.",
        epilog=f"examples:\n  {prog} --out acceptance.json\n  {prog} --sections A,B --budget 120",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="[default: cuda if there is one]")
    sections = ", ".join(f"{letter} {section.title}" for letter, section in SECTIONS.items())
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"by letter: {sections}  [default: all]")
    parser.add_argument("--budget", type=float, default=_BUDGET_S, help="seconds for all sections  [default: 540]")
    parser.add_argument("--out", type=Path, help="file for all rows in JSON, written after each row")
    parser.add_argument("--authors", type=Path, help="checkout of github.com/xinwangChen/EDT; its code is run")
    parser.add_argument("--attention-table", type=Path, help="file for the fastest attention by tokens, in JSON")
    parser.add_argument("--scale", type=float, help="share of the full size  [default: 1; on a CPU 0.02]")
    return parser


def accept(options: argparse.Namespace) -> Report:
    """Run the sections. Raises UserError for options that cannot be used."""
    sections = _sections(options.sections)
    device = _device(options.device)
    _check(options)
    exactness.use_deterministic_workspace()
    report = Report({"format": FORMAT, **machine(device)}, options.out)
    say(", ".join(f"{name} {value}" for name, value in report.head.items() if value is not None))
    report.write()
    with tempfile.TemporaryDirectory(prefix="edt-acceptance-") as work:
        scale = options.scale or (1.0 if device.type == "cuda" else _SMALL)
        setting = Setting(device, scale, Path(work), options.authors, options.attention_table)
        _run(sections, setting, report, time.monotonic() + options.budget)
    say(report.summary())
    if missing := report.not_measured:
        say(f"note: {missing} rows of correctness were not measured; raise --budget to prove all of it", err=True)
    return report


def _run(sections: list[str], setting: Setting, report: Report, end: float) -> None:
    """Run each section until its share of the time that is left; time that it leaves goes to those after it."""
    for number, letter in enumerate(sections):
        section = SECTIONS[letter]
        shares = sum(SECTIONS[later].share for later in sections[number:])
        now = time.monotonic()
        deadline = now + max(end - now, 0) * section.share / shares
        say(f"\n{letter}  {section.title}, at most {deadline - now:.0f} s")
        for task in section.tasks(setting):
            run_task(letter, task, report, deadline, setting.device)


def _sections(text: str) -> list[str]:
    letters = [part.strip().upper() for part in text.split(",") if part.strip()]
    unknown = [letter for letter in letters if letter not in SECTIONS]
    if unknown or not letters:
        raise UserError(f"--sections is {text!r}; name some of {', '.join(SECTIONS)}, separated by commas")
    return list(dict.fromkeys(letters))


def _device(name: str | None) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "--device is cuda, but PyTorch cannot use a GPU here; check the driver (nvidia-smi) and that this PyTorch "
            "is built for CUDA, or use --device cpu"
        )
    kind = name or ("cuda" if available else "cpu")
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")


def _check(options: argparse.Namespace) -> None:
    if options.scale is not None and not 0.001 <= options.scale <= 4:
        raise UserError(f"--scale is {options.scale:g}; use 0.001 to 4")
    if not options.budget > 0:
        raise UserError(f"--budget is {options.budget:g}; use a number of seconds above 0")
    if options.authors is not None and not (options.authors / MODELS_FILE).is_file():
        raise UserError(
            f"--authors is {options.authors}, which has no {MODELS_FILE}; give a checkout of github.com/xinwangChen/EDT"
        )
    for option, path in (("--out", options.out), ("--attention-table", options.attention_table)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UserError(f"{option} is {path}, which cannot be a file; give a file in a folder that exists")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m edt_core.acceptance") -> None:
    """Run the acceptance. Exit code 1: a row of correctness failed; 3: some were not measured; 2: wrong options."""
    options = make_parser(prog).parse_args(arguments)
    try:
        report = accept(options)
    except UserError as error:
        say(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped; rows so far are written", err=True)
        sys.exit(130)
    for row in report.failed:
        say(f"failed: {row.name}: {row.note or f'{row.value} {row.unit}, {row.bound}'}", err=True)
    if report.not_measured and not report.failed:
        say(f"{report.not_measured} rows of correctness were not measured; raise --budget, or free the GPU", err=True)
        sys.exit(3)
    sys.exit(1 if report.failed else 0)
