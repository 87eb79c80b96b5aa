"""What a person sees of a run: a tree of its steps on a terminal, a plain line at each turn elsewhere."""

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
from pipelines.terminal.step_tree import Node, StepTree, clock

_EVERY_S = 60.0  # how often a running step says how far it is where there is no terminal
_SOURCE = "source"


class SourceProgress(Silent):
    """The `Progress` of what the driver does itself, under the name `source`."""

    def __init__(self, terminal: "Terminal") -> None:
        self.terminal = terminal

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        self.terminal.show({_SOURCE: Shown(done, total, note, detail)}, [])
        if done >= total:
            self.terminal.forget(_SOURCE)

    def warn(self, message: str) -> None:
        self.terminal.warn(f"{_SOURCE}: {message}")


class Terminal:
    """Shows a run. What is said goes into its log as well, if there is one."""

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
        self._began = time.monotonic()
        self._told: dict[str, float] = {}  # when a running step last said how far it is
        self._warned = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.freeze()

    def say(self, text: str, style: str = "") -> None:
        """A line of its own, above the tree while that is shown."""
        from rich.markup import escape

        text = printable(redacted(text))
        self.console.print(f"[{style}]{escape(text)}[/]" if style else escape(text))
        self._note(text)

    def tell(self, text: str, style: str = "", indent: int = 2) -> None:
        """Sentences, wrapped at words where there is a terminal; lines after the first are indented."""
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
        self.tell(f"warning: {message}", "yellow")

    def source_progress(self) -> "SourceProgress":
        """Where listing and digesting the images tell how far they are, before there is a board."""
        return SourceProgress(self)

    def freeze(self) -> None:
        """Leave the tree on the screen as it is; what is said from now on comes beneath it."""
        self._frozen = True
        if self._live is not None:
            self._live.stop()
            self._live = None

    def called(self, step: str, needs: tuple[str, ...]) -> None:
        """A step that the run is about, and the steps it waits for."""
        self.tree.add(step, needs)
        self._wake()

    def reused(self, step: str, fingerprint: str) -> None:
        node = self.tree.get(step)
        node.state, node.note = "reused", fingerprint[:12]
        self._line(node, f"{fingerprint[:12]}", "dim")

    def show(self, counts: Mapping[str, Shown], warnings: list[tuple[str, str]]) -> None:
        """Bring the tree up to the board's state; a step runs from its first count on."""
        for step, message in warnings[self._warned :]:
            self.warn(f"{step}: {message}")
        self._warned = max(self._warned, len(warnings))
        for step, shown in counts.items():
            node = self.tree.get(step)
            if node.state in ("waiting", "running"):
                node.count(shown)
                self._tell_pace(node)
        self._wake()

    def forget(self, step: str) -> None:
        """Take a step out of the tree until there is another count."""
        self.tree.remove(step)
        self._told.pop(step, None)

    def finished(self, step: str, seconds: float, fingerprint: str, headline: str = "") -> None:
        """A step that was made in this run; `headline` is its result in a word, as a metric."""
        node = self.tree.get(step)
        last = node.shown.detail if node.shown is not None else ""
        note = ", ".join(part for part in (clock(seconds), headline or last) if part)
        node.state, node.note = "done", note
        self._line(node, f"{fingerprint[:12]}  {seconds:6.1f} s  {headline or last}".rstrip(), "green")

    def stopped(self, step: str, reason: str) -> None:
        """A step that was asked to stop, or that waited for one."""
        self._end(step, "stopped", reason)

    def failed(self, step: str, error: BaseException | str, raised: BaseException | None = None) -> None:
        """A step that failed, or (with a text) one that could not begin.

        The traceback is for the log alone: that of `raised`, which holds the error and where in a worker it came up.
        """
        if isinstance(error, str):
            self._end(step, "failed", error)
            return
        self._end(step, "failed", explained(error).cause)
        self._note("".join(traceback.format_exception(raised or error)))

    def _end(self, step: str, state: Any, reason: str) -> None:
        node = self.tree.get(step)
        node.state, node.note = state, on_one_line(redacted(reason).splitlines()[0]) if reason else ""
        self._line(node, node.note[:100], "red" if state == "failed" else "yellow")

    def _line(self, node: Node, note: str, style: str) -> None:
        """Say how a step ended: its line in the tree does on a terminal, and the log has it there."""
        text = f"  {node.state:<9} {node.name:<40} {note}".rstrip()
        if self.console.is_terminal:
            self._note(text)
        else:
            self.say(text, style)

    def _tell_pace(self, node: Node) -> None:
        """Where there is no terminal, a line as a step begins and one every minute; of the source, if it takes that."""
        now = time.monotonic()
        if node.name == _SOURCE:
            self._told.setdefault(_SOURCE, now)
        if not self.console.is_terminal and now - self._told.get(node.name, -_EVERY_S) >= _EVERY_S:
            self._told[node.name] = now
            self.say(f"  running   {node.name:<40} {node.progress()}".rstrip())

    def _note(self, text: str) -> None:
        if self.log is not None:
            self.log.write(text)

    def _wake(self) -> None:
        """Show the tree, if there is a terminal to show it on."""
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
        foot = [f"{self.tree.tally()}  {clock(time.monotonic() - self._began)}"]
        foot += [f"log  {self.log.path}"] if self.log is not None else []
        tree = self.tree.render(size.width, size.height - len(foot) - 1, unicode)
        return Group(tree, *(Text(on_one_line(line), "dim", no_wrap=True, overflow="ellipsis") for line in foot))
