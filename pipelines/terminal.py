"""What a person sees of a run: one line a step while it goes, fed by a Ray actor that workers report to."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edt_core.progress import Silent
from jobs.progress import BoardProgress
from pipelines.catalog import Catalog


class StepProgress(BoardProgress):
    """The `Progress` of one step: counts go to the board, metrics to the step's MLflow run. Picklable."""

    def __init__(self, step: str, board: Any, catalog: Catalog, run_id: str) -> None:
        super().__init__(step, board)
        self.catalog, self.run_id = catalog, run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.catalog.log_metrics(self.run_id, values, step)


class SourceProgress(Silent):
    """The `Progress` of what the driver does itself: a bar named `source`."""

    def __init__(self, terminal: "Terminal") -> None:
        self.terminal = terminal

    def update(self, done: int, total: int, note: str = "", part: int | None = None) -> None:
        self.terminal.show({"source": (done, total, note)}, [])

    def warn(self, message: str) -> None:
        self.terminal.warn(f"source: {message}")


@dataclass
class _Line:
    task: Any
    started: float


class Terminal:
    """Renders a run: live bars on a terminal, a plain line at each start and end elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._lines: dict[str, _Line] = {}
        self._warned = 0

    def __enter__(self) -> "Terminal":
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str, style: str = "") -> None:
        from rich.markup import escape

        self.console.print(f"[{style}]{escape(text)}[/]" if style else escape(text))

    def warn(self, message: str) -> None:
        self.say(f"warning: {message}", "yellow")

    def source_progress(self) -> "SourceProgress":
        """Where listing and digesting the images tell how far they are, before there is a board."""
        return SourceProgress(self)

    def reused(self, step: str, fingerprint: str) -> None:
        self.say(f"  reused    {step:<40} {fingerprint[:12]}", "dim")

    def show(self, counts: Mapping[str, tuple[int, int, str]], warnings: list[tuple[str, str]]) -> None:
        """Bring the bars up to the board's state; steps appear with their first count."""
        for step, message in warnings[self._warned :]:
            self.warn(f"{step}: {message}")
        self._warned = len(warnings)
        for step, (done, total, note) in counts.items():
            if step not in self._lines:
                self._lines[step] = _Line(self._bars.add_task(step, total=total, note="", left=""), time.monotonic())
            line = self._lines[step]
            seconds = max(time.monotonic() - line.started, 1e-9)
            left = f"{done / seconds:.1f}/s, {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
            self._bars.update(line.task, completed=done, total=total, note=note, left=left)

    def finished(self, step: str, seconds: float, fingerprint: str) -> None:
        if step in self._lines:
            self._bars.update(self._lines[step].task, visible=False)
        self.say(f"  done      {step:<40} {fingerprint[:12]}  {seconds:6.1f} s", "green")

    def failed(self, step: str, reason: str) -> None:
        if step in self._lines:
            self._bars.update(self._lines[step].task, visible=False)
        self.say(f"  failed    {step:<40} {reason.splitlines()[0][:100] if reason else ''}", "red")
