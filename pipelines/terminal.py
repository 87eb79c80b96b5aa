"""What a person sees of a run: one line a step while it goes, fed by a Ray actor that workers report to."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edt_core.progress import Silent
from edt_core.redaction import redacted
from jobs.progress import Shown


class SourceProgress(Silent):
    """The `Progress` of what the driver does itself: a bar named `source`."""

    def __init__(self, terminal: "Terminal") -> None:
        self.terminal = terminal

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        self.terminal.show({"source": Shown(done, total, note, detail)}, [])
        if done >= total:
            self.terminal.forget("source")

    def warn(self, message: str) -> None:
        self.terminal.warn(f"source: {message}")


@dataclass
class _Line:
    """A bar, and where and when its present phase began: what was there before is no speed."""

    task: Any
    phase: tuple[int, str] = (-1, "")
    first: int = 0
    started: float = 0.0

    def left(self, shown: Shown) -> str:
        """Rate and time left; a new phase is one of another total or note."""
        if self.phase != (shown.total, shown.note):
            self.phase, self.first, self.started = (shown.total, shown.note), shown.done, time.monotonic()
        made, seconds = shown.done - self.first, time.monotonic() - self.started
        if made <= 0 or seconds <= 0 or shown.done >= shown.total:
            return ""
        return f"{made / seconds:.1f}/s, {seconds / made * (shown.total - shown.done):.0f} s left"


class Terminal:
    """Renders a run: live bars on a terminal, a plain line at each start and end elsewhere."""

    def __init__(self, to_stderr: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(highlight=False, soft_wrap=True, stderr=to_stderr)
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

        text = redacted(text)
        self.console.print(f"[{style}]{escape(text)}[/]" if style else escape(text))

    def warn(self, message: str) -> None:
        self.say(f"warning: {message}", "yellow")

    def source_progress(self) -> "SourceProgress":
        """Where listing and digesting the images tell how far they are, before there is a board."""
        return SourceProgress(self)

    def reused(self, step: str, fingerprint: str) -> None:
        self.say(f"  reused    {step:<40} {fingerprint[:12]}", "dim")

    def show(self, counts: Mapping[str, Shown], warnings: list[tuple[str, str]]) -> None:
        """Bring the bars up to the board's state; steps appear with their first count."""
        from rich.markup import escape

        for step, message in warnings[self._warned :]:
            self.warn(f"{step}: {message}")
        self._warned = len(warnings)
        for step, shown in counts.items():
            if step not in self._lines:
                self._lines[step] = _Line(self._bars.add_task(step, total=shown.total, note="", left=""))
            line = self._lines[step]
            note = f"{shown.note}, {shown.detail}" if shown.note and shown.detail else shown.note or shown.detail
            self._bars.update(
                line.task,
                completed=shown.done,
                total=shown.total,
                note=escape(note),
                left=line.left(shown),
            )

    def hide(self, step: str) -> None:
        """Take a step's bar away for good."""
        if step in self._lines:
            self._bars.update(self._lines[step].task, visible=False)

    def forget(self, step: str) -> None:
        """Take a bar away until there is another count."""
        if (line := self._lines.pop(step, None)) is not None:
            self._bars.remove_task(line.task)

    def finished(self, step: str, seconds: float, fingerprint: str) -> None:
        self.hide(step)
        self.say(f"  done      {step:<40} {fingerprint[:12]}  {seconds:6.1f} s", "green")

    def stopped(self, step: str, reason: str) -> None:
        """A step that was asked to stop, or that waited for one."""
        self.hide(step)
        self.say(f"  stopped   {step:<40} {reason.splitlines()[0][:100] if reason else ''}", "yellow")

    def failed(self, step: str, reason: str) -> None:
        self.hide(step)
        self.say(f"  failed    {step:<40} {reason.splitlines()[0][:100] if reason else ''}", "red")
