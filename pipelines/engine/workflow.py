"""A workflow is plain Python that calls steps. A call returns a future; futures are the inputs of later calls."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edt_core.config import Section
from edt_core.errors import Stopped
from edt_core.store.artifact import Artifact, Source
from edt_core.store.store import Store
from jobs.runtime.board import Board
from jobs.runtime.cluster import cause_of
from jobs.runtime.progress import STOPPING, Interrupts
from jobs.stages.stage import Stage
from pipelines.engine.step import StepFuture, StepTask, close_run, input_fingerprints, needs_of, run_step
from pipelines.engine.steps import D, Promotion
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.run_record import RunRecord
from pipelines.tracking.wandb_mirror import WandbProject

_POLL_S = 0.5
_MAX_RETRIES = 3  # of a step whose process or node was lost; an error that the step raises is not retried


@dataclass
class Workflow:
    """One run of a workflow: submits the steps without an artifact and tracks the state of every step."""

    store: Store
    catalog: Catalog
    run_id: str
    terminal: Terminal
    connect: Callable[[], bool]  # joins or starts Ray when the first step has to run; True for a shared cluster
    wandb: WandbProject | None = None
    futures: dict[str, StepFuture] = field(default_factory=dict)
    failures: dict[str, BaseException] = field(default_factory=dict)
    stopped: dict[str, BaseException] = field(default_factory=dict)  # on request, or by an input that did
    interrupts: Interrupts = field(default_factory=Interrupts)
    taken: set[str] = field(default_factory=set)  # steps whose artifact another run made while this one was in progress
    _unfinished: set[str] | None = None  # ids of MLflow runs of steps that did not end
    _done: set[str] = field(default_factory=set)
    _board: Any = None
    _shared: bool = False

    def step(self, name: str, stage: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        """Reuse the artifact of this fingerprint, or submit the step. Never waits."""
        fingerprint = stage.fingerprint(config, input_fingerprints(inputs))
        needs = needs_of(inputs)
        self.terminal.called(name, needs)
        artifact = self.store.find(stage.kind, fingerprint, self.terminal.warn)
        if artifact is not None:
            stage.accept(config, artifact.counts)
            self._complete_record(artifact)
            future = StepFuture(name, stage.kind, fingerprint, needs, artifact=artifact)
            self.terminal.reused(name, fingerprint)
        else:
            ref = self._submit(StepTask(name, stage, config, fingerprint, *self._surroundings(), self.wandb), inputs)
            future = StepFuture(name, stage.kind, fingerprint, needs, ref=ref)
        self.futures[name] = future
        return future

    def adopt(self, name: str, stage: Stage, item: Artifact | Source, origin: str) -> StepFuture:
        """The future of an artifact that is taken as it is."""
        assert isinstance(item, Artifact), name
        self.terminal.called(name, (origin,))
        self.futures[name] = StepFuture(name, stage.kind, item.fingerprint, (origin,), artifact=item)
        self.terminal.reused(name, item.fingerprint, origin)
        return self.futures[name]

    def promote(self, promotion: Promotion[D]) -> D | None:
        """Wait for the branch, then register its model. None if a step of the branch, or MLflow, failed.

        A failed branch does not affect the others. Raises Stopped as `wait` does.
        """
        if not self.wait(*promotion.steps.values()):
            return None
        artifacts = {role: future.result() for role, future in promotion.named.items()}
        self.terminal.called(promotion.name, (promotion.after,))
        began = time.monotonic()
        try:
            compared = promotion.compare(self, self.catalog, artifacts)
            self.wait(*compared)
            with self.store.lock("promote", promotion.model):
                decision = promotion.decide(self.catalog, self.run_id, artifacts)
        except Stopped:
            raise
        except Exception as error:  # after any error of MLflow, the other branches continue
            self.failures[promotion.name] = error
            self.terminal.failed(promotion.name, error)
            return None
        headline = f"version {decision.version}: {decision}"
        self.terminal.finished(promotion.name, time.monotonic() - began, "", headline)
        return decision

    def wait(self, *futures: StepFuture) -> bool:
        """Wait for steps and show the progress of all. True if each of them finished its artifact.

        After the first Ctrl-C, raises Stopped when the steps that can stop have stopped.
        """
        import ray

        waiting = [future for future in self.futures.values() if self._pending(future)]
        names = {future.name for future in futures}
        while any(future.name in names for future in waiting):
            ray.wait([future.ref for future in waiting], num_returns=1, timeout=_POLL_S)
            self._show()
            for future in waiting:
                if ray.wait([future.ref], timeout=0)[0]:
                    self._settle(future)
            waiting = [future for future in waiting if self._pending(future)]
            if self.interrupts.asked and not any(self._settles_soon(future) for future in waiting):
                raise Stopped("stopped")
        return not any(future.name in self.failures or future.name in self.stopped for future in futures)

    def wait_all(self) -> None:
        """Wait for every step that was called."""
        self.wait(*self.futures.values())

    def culprits(self) -> dict[str, BaseException]:
        """The failures that are not caused by an earlier failure."""
        return self._first_of(self.failures)

    def where_stopped(self) -> dict[str, BaseException]:
        """The steps that stopped on request, with their messages."""
        return self._first_of(self.stopped)

    def _first_of(self, errors: Mapping[str, BaseException]) -> dict[str, BaseException]:
        needs = {
            name: future.needs for name, future in self.futures.items()
        }  # a promotion begins only without failures
        return {n: e for n, e in errors.items() if not any(need in errors for need in needs.get(n, ()))}

    def artifacts(self) -> dict[str, Artifact]:
        """The finished artifacts so far, by step."""
        return {name: f.result() for name, f in self.futures.items() if name in self._done or f.reused}

    def _surroundings(self) -> tuple[Store, Catalog, str, Any, bool]:
        from jobs.runtime.cluster import start_beside

        if self._board is None:
            self._shared = self.connect()
            self._board = start_beside(Board)
        return self.store, self.catalog, self.run_id, self._board, self._shared

    def _submit(self, task: StepTask, inputs: Mapping[str, StepFuture | Source]) -> Any:
        import ray

        # Ray resolves futures that are arguments, not those inside a container: pass roles and values separately.
        values = [item.ref or item.artifact if isinstance(item, StepFuture) else item for item in inputs.values()]
        # Ray may restart a step on another node. The step then reuses its finished parts and continues its record.
        return ray.remote(_run).options(num_cpus=0, max_retries=_MAX_RETRIES).remote(task, list(inputs), *values)

    def _complete_record(self, artifact: Artifact) -> None:
        """Complete the MLflow run of an artifact whose process was lost between the commit and the end of the run."""
        if self._unfinished is None:
            self._unfinished = self.catalog.unfinished_runs()
        run_id, manifest = artifact.manifest.mlflow_run_id, artifact.manifest
        if run_id is None or run_id not in self._unfinished:
            return
        with self.store.lock(manifest.kind, artifact.fingerprint):  # its process may be alive and still writing
            if run_id in self.catalog.unfinished_runs():
                close_run(RunRecord(self.catalog, run_id), artifact)

    def _pending(self, future: StepFuture) -> bool:
        return not future.reused and not any(
            future.name in ended for ended in (self._done, self.failures, self.stopped)
        )

    def _settles_soon(self, future: StepFuture) -> bool:
        """Whether a step is stopping, or can no longer begin."""
        ended = self.failures.keys() | self.stopped.keys()
        return future.name in self.interrupts.listening or not ended.isdisjoint(future.needs)

    def _settle(self, future: StepFuture) -> None:
        import ray

        try:
            artifact = future.result()
        except Exception as error:
            cause = cause_of(error)
            stopped = isinstance(cause, Stopped)
            ended, word = (self.stopped, "stopped") if stopped else (self.failures, "failed")
            ended[future.name] = cause
            culprits = [name for name in future.needs if name in ended]
            reason = f"not run, {self._origin(culprits[0])} {word}" if culprits else ""
            if stopped:
                self.terminal.stopped(future.name, reason or str(cause))
            elif reason:
                self.terminal.skipped(future.name, reason)
            else:
                self.terminal.failed(future.name, cause, raised=error)
            return
        self._done.add(future.name)
        if maker := ray.get(self._board.made_elsewhere.remote(True)).get(future.name):
            self.taken.add(future.name)
            self.terminal.reused(future.name, future.fingerprint, maker)
        else:
            self.terminal.finished(future.name, artifact.manifest.duration_s, future.fingerprint, _headline(artifact))

    def _origin(self, name: str) -> str:
        """The step whose end kept this one from running: itself, or one that it depends on."""
        ended = self.failures.keys() | self.stopped.keys()
        while needs := [need for need in self.futures[name].needs if need in ended]:
            name = needs[0]
        return name

    def _show(self) -> None:
        import ray

        board = self._board
        (counts, warnings, listening), makers = ray.get([board.read.remote(), board.made_elsewhere.remote()])
        self.interrupts.heard_by(name for name in listening if self._pending(self.futures[name]))
        if self.interrupts.passed_on(self._board):
            self.terminal.say(STOPPING, "yellow")
        self.terminal.show(counts, warnings)
        self.terminal.made_elsewhere(makers)


def _headline(artifact: Artifact) -> str:
    """The first metric of an evaluation, as `fid 34.27`; nothing for other artifacts."""
    from edt_core.evaluation.metrics import in_order

    metrics = artifact.counts["metrics"] if artifact.manifest.kind == "evaluation" else {}
    return next((f"{name} {metrics[name]:.4g}" for name in in_order(metrics)), "")


def _run(task: StepTask, roles: list[str], *values: Any) -> Artifact:
    return run_step(task, dict(zip(roles, values, strict=True)))
