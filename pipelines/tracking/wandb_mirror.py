"""The curves and final numbers of a step in Weights & Biases, beside those in MLflow.

A thread of its own talks to W&B, so that no step waits for it. What it cannot deliver is one warning, never a failure.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

from edt_core.errors import UserError
from edt_core.printing.redaction import redacted, redacted_values

_PATIENCE_S = 30.0  # how long the end of a step waits for W&B
_LONGEST = 300  # characters of W&B's own words
Work = Callable[[Any], None]  # of a run of W&B


@dataclass(frozen=True)
class WandbProject:
    """A project of W&B, the group that all steps of one run belong to, and the folder for W&B's own files."""

    project: str
    entity: str | None
    group: str
    folder: str | None  # None: W&B's choice

    @classmethod
    def of(cls, project: str | None, entity: str | None, group: str, folder: str | None) -> "WandbProject | None":
        """None without a project."""
        return None if project is None else cls(project, entity, group, folder)


def check_wandb(project: str | None) -> None:
    """Raise UserError if a project is set and the package is missing."""
    if project is None:
        return
    try:
        import wandb

        wandb.init  # noqa: B018  a folder of this name is a package without contents
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"wandb.project is {project!r}, but the package wandb is not installed; install it "
            "(pip install 'edt-pipeline[wandb]'), or leave wandb.project unset"
        ) from error


class WandbMirror:
    """One run of W&B for one step. It begins with the first number; a step without numbers has no run there."""

    def __init__(
        self, project: WandbProject, run_id: str, name: str, config: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._settings: dict[str, Any] = {
            "project": project.project,
            "entity": project.entity,
            "group": project.group,
            "dir": project.folder,
            "id": run_id,
            "name": name,
            "config": redacted_values(config),
            "resume": "allow",  # a step that Ray started again
        }
        self._warn = warn
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._thread: Thread | None = None

    def metrics(self, rows: Iterable[tuple[str, float, int]]) -> None:
        """Send (name, value, step) rows, in the order of their steps."""
        by_step: dict[int, dict[str, float]] = defaultdict(dict)
        for name, value, step in rows:
            by_step[step][name] = value
        for step, values in sorted(by_step.items()):
            self._put(partial(_log, values, step))

    def summary(self, values: Mapping[str, float]) -> None:
        """Send the final numbers of the step."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._put(lambda run: run.summary.update(finite))

    def close(self, failed: bool = False) -> None:
        """End the run of W&B. Waits for it, but not for long."""
        if self._thread is None:
            return
        self._work.put(lambda run: run.finish(exit_code=int(failed)))
        self._work.put(None)
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            self._warn(f"W&B did not take all of {self._settings['name']} within {_PATIENCE_S:g} s; MLflow has it")

    def _put(self, work: Work) -> None:
        if self._thread is None:
            self._thread = Thread(target=self._follow, name="wandb", daemon=True)
            self._thread.start()
        self._work.put(work)

    def _follow(self) -> None:
        """Do all the work, up to the first error."""
        try:
            import wandb

            settings = wandb.Settings(console="off", silent=True, disable_git=True)
            # Steps share processes: without `reinit`, a run that was left open would get the numbers of the next step.
            run = wandb.init(**self._settings, reinit="create_new", settings=settings)
            while (work := self._work.get()) is not None:
                work(run)
        except BaseException as error:  # wandb ends a process by SystemExit for some mistakes
            words = redacted(" ".join(str(error).split()))[:_LONGEST]
            self._warn(f"W&B has not all of {self._settings['name']}; MLflow has it ({type(error).__name__}: {words})")


def _log(values: Mapping[str, float], step: int, run: Any) -> None:
    run.log(dict(values), step=step)
