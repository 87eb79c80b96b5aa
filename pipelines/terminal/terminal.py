"""The display of a run: a live tree of its steps on a terminal, plain lines elsewhere."""

import textwrap
import time
import traceback
from collections.abc import Mapping
from typing import Any

from edt_core.printing.console import on_one_line, printable
from edt_core.printing.redaction import redacted
from edt_core.progress import Silent
from jobs.runtime.board import Shown
from jobs.runtime.failure import explained
from pipelines.terminal.run_log import RunLog
from pipelines.terminal.step_tree import SOURCE, Node, StepTree, clock, cut

_EVERY_S = 60.0  # between progress lines of a running step without a terminal


class SourceProgress(Silent):
    """The `Progress` of the driver's own work, under the name `source`."""

    def __init__(self, terminal: "Terminal") -> None:
        self.terminal = terminal

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        self.terminal.show({SOURCE: Shown(done, total, note, detail)}, [])
        if done >= total:
            self.terminal.forget(SOURCE)

    def warn(self, message: str) -> None:
        self.terminal.warn(f"{SOURCE}: {message}")


class Terminal:
    """Displays a run. All messages also go to its log, if there is one."""

    def __init__(self, to_stderr: bool = False, log: RunLog | None = None) -> None:
        from rich.console import Console

        self.log = log
        self.tree = StepTree()
        self.console = Console(
            highlight=False,
            soft_wrap=True,
            stderr=to_stderr and log is None,
            file=log.screen if log is not None else None,
        )
        self._live: Any = None
        self._frozen = False
        self._start = time.monotonic()
        self._last_lines: dict[str, float] = {}  # time of the last progress line of each running step
        self._warnings = 0  # number of warnings shown

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.freeze()

    def say(self, text: str, style: str = "") -> None:
        """Print a line, above the tree while that is shown."""
        from rich.markup import escape

        text = printable(redacted(text))
        self.console.print(f"[{style}]{escape(text)}[/]" if style else escape(text))
        self._note(text)

    def say_wrapped(self, text: str, style: str = "", indent: int = 2) -> None:
        """Print sentences, wrapped at words on a terminal, with all lines after the first indented."""
        if self.console.is_terminal:
            text = textwrap.fill(
                text,
                self.console.width,
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        self.say(text, style)

    def warn(self, message: str) -> None:
        self.say_wrapped(f"warning: {message}", "yellow")

    def source_progress(self) -> "SourceProgress":
        """The progress of listing and digesting the images, before there is a board."""
        return SourceProgress(self)

    def freeze(self) -> None:
        """Stop updating the tree and leave it on the screen. Later messages appear below it."""
        self._frozen = True
        if self._live is not None:
            self._live.stop()
            self._live = None

    def called(self, step: str, needs: tuple[str, ...]) -> None:
        """Add a step of the run, with the steps it waits for."""
        self.tree.add(step, needs)
        self._wake()

    def reused(self, step: str, fingerprint: str, origin: str = "") -> None:
        """A step with a finished artifact; `origin` is what that belongs to, as a registered version."""
        node = self.tree.get(step)
        node.state, node.note = "reused", f"{fingerprint[:12]}  of {origin}" if origin else fingerprint[:12]
        self._line(node, node.note, "dim")

    def show(self, counts: Mapping[str, Shown], warnings: list[tuple[str, str]]) -> None:
        """Update the tree from the board. A step is running from its first count on."""
        for step, message in warnings[self._warnings :]:
            self.warn(f"{step}: {message}")
        self._warnings = max(self._warnings, len(warnings))
        for step, count in counts.items():
            node = self.tree.get(step)
            if node.state in ("waiting", "running"):
                node.count(count)
                self._show_pace(node)
        self._wake()

    def made_elsewhere(self, makers: Mapping[str, str]) -> None:
        """Show which other runs make the artifacts of steps that wait for them."""
        for step, maker in makers.items():
            node, note = self.tree.get(step), f"being made by {maker}"
            if node.state == "waiting" and node.note != note:
                node.note = note
                self._line(node, note, "dim")

    def forget(self, step: str) -> None:
        """Remove a step from the tree until its next count."""
        self.tree.remove(step)
        self._last_lines.pop(step, None)
        if self._live is not None and not self.tree.nodes:  # nothing is left to show: leave no empty tree behind
            self._live.transient = True
            self._live.stop()
            self._live = None

    def finished(self, step: str, seconds: float, fingerprint: str, headline: str = "") -> None:
        """Show a step as done. `headline` is its result in short, such as a metric."""
        node = self.tree.get(step)
        last = node.latest.detail if node.latest is not None else ""
        note = ", ".join(part for part in (clock(seconds), headline or last) if part)
        node.state, node.note = "done", note
        self._line(node, f"{fingerprint[:12]}  {seconds:6.1f} s  {headline or last}".rstrip(), "green")

    def stopped(self, step: str, reason: str) -> None:
        """Show a step as stopped: it was interrupted, or waited for one that was."""
        self._end(step, "stopped", reason)

    def skipped(self, step: str, reason: str) -> None:
        """Show a step as skipped: a step that it needs failed."""
        self._end(step, "skipped", reason)

    def failed(self, step: str, error: BaseException, raised: BaseException | None = None) -> None:
        """Show a step as failed.

        The traceback goes only to the log. `raised` contains the error and its place in a worker.
        """
        self._end(step, "failed", explained(error).cause)
        self._note("".join(traceback.format_exception(raised or error)))

    def _end(self, step: str, state: Any, reason: str) -> None:
        node = self.tree.get(step)
        node.state, node.note = state, on_one_line(redacted(reason).splitlines()[0]) if reason else ""
        self._line(node, node.note[:100], "red" if state == "failed" else "yellow")

    def _line(self, node: Node, note: str, style: str) -> None:
        """Print how a step ended. On a terminal the tree shows it, so the line goes only to the log."""
        text = f"  {node.state:<9} {node.name:<40} {note}".rstrip()
        if self.console.is_terminal:
            self._note(text)
        else:
            self.say(text, style)

    def _show_pace(self, node: Node) -> None:
        """Without a terminal, print a line when a step starts and then every minute (the source only the latter)."""
        now = time.monotonic()
        if node.name == SOURCE:
            self._last_lines.setdefault(SOURCE, now)
        if not self.console.is_terminal and now - self._last_lines.get(node.name, -_EVERY_S) >= _EVERY_S:
            self._last_lines[node.name] = now
            self.say(f"  running   {node.name:<40} {node.progress()}".rstrip())

    def _note(self, text: str) -> None:
        if self.log is not None:
            self.log.write(text)

    def _wake(self) -> None:
        """Start the live tree if there is a terminal."""
        if self._live is not None or self._frozen or not self.console.is_terminal or not self.tree.nodes:
            return
        from rich.live import Live

        self._live = Live(
            get_renderable=self._rendered,
            console=self.console,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def _rendered(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        size = self.console.size
        unicode = (self.console.encoding or "").lower().startswith("utf")
        footer = [f"{self.tree.tally()}  {clock(time.monotonic() - self._start)}".lstrip()]
        footer += [f"log  {self.log.path}"] if self.log is not None else []
        tree = self.tree.render(size.width, size.height - len(footer) - 1, unicode)
        return Group(tree, *(cut(Text(on_one_line(line), "dim"), size.width, unicode) for line in footer))
