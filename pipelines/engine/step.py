"""The durable step: computed once, then reused by its fingerprint.

A step runs as a Ray task. Two runs that need the same artifact at the same time compute it once. On a shared cluster,
a Ray actor named after the fingerprint is the lock. In a local store, a file lock is used as well.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from edt_core.config import Section, result_fields
from edt_core.errors import Stopped
from edt_core.printing.table import SHORT
from edt_core.store.artifact import Artifact, Source
from edt_core.store.store import Store
from jobs.runtime.board import BoardProgress
from jobs.runtime.cluster import cause_of
from jobs.runtime.reach import check_here
from jobs.runtime.tracking import sqlite_path
from jobs.stages.stage import Input, Stage
from pipelines.engine.delivery import Delivery, quick_http, with_patience
from pipelines.tracking.catalog import DATASET_KINDS, Catalog
from pipelines.tracking.run_record import RunRecord
from pipelines.tracking.wandb_mirror import WandbMirror, WandbProject

_ANOTHER = "another run"
_RECORD_FAILURE_S = 30.0  # how long a failed step waits for a server that is down, to record the failure


@dataclass(frozen=True)
class StepTask:
    """Everything a worker needs to run one step, except its input artifacts, which arrive when they are finished."""

    name: str
    stage: Stage
    config: Section
    fingerprint: str
    store: Store
    catalog: Catalog
    parent_run: str
    board: Any
    shared_cluster: bool
    wandb: WandbProject | None = None

    @property
    def kind(self) -> str:
        return self.stage.kind


@dataclass(frozen=True)
class StepFuture:
    """An artifact that exists (`artifact`) or is being computed (`ref`). An input of the steps that need it."""

    name: str
    kind: str
    fingerprint: str
    needs: tuple[str, ...] = ()  # names of the steps that its inputs come from
    artifact: Artifact | None = None
    ref: Any = None

    @property
    def reused(self) -> bool:
        return self.artifact is not None

    def result(self) -> Artifact:
        """Wait for the artifact. Raises the error of its step, or of an earlier step."""
        artifact: Artifact = self.artifact if self.artifact is not None else ray.get(self.ref)
        return artifact


def run_step(task: StepTask, inputs: Mapping[str, Input]) -> Artifact:
    """Compute one step's artifact. If another run is computing it, wait for that run and reuse the artifact."""
    check_here(task.store.root.local, "the store")
    database = sqlite_path(task.catalog.tracking_uri)
    check_here(database if database is not None and database.is_absolute() else None, "the database of MLflow")
    busy = _Waiting(task).show
    with task.store.lock(task.kind, task.fingerprint, busy), _lease(task, busy):
        artifact = task.store.find(task.kind, task.fingerprint)
        if artifact is None:
            task.board.made_by.remote(task.name, "")
            return _execute(task, inputs)
        maker = _maker(task, artifact.manifest.mlflow_run_id)
        with suppress(RayError):  # without the board there is no run that shows it
            ray.get(task.board.made_by.remote(task.name, maker, True))
        return artifact


@dataclass
class _Waiting:
    """Shows which run is making the artifact that a step waits for."""

    task: StepTask
    maker: str = _ANOTHER

    def show(self) -> None:
        if self.maker == _ANOTHER:
            self.maker = _maker(self.task)
            self.task.board.made_by.remote(self.task.name, self.maker)


def _maker(task: StepTask, step_run: str | None = None) -> str:
    """The run that made an artifact in the MLflow run `step_run`, or that is making it now if that is None, as text.

    "" if it is this one, as after a restart of the step.
    """
    with quick_http(), suppress(Exception):  # for display only
        if (run := task.catalog.run_of_step(task.kind, task.fingerprint, step_run)) is not None:
            parent = str(run.data.tags["mlflow.parentRunId"])
            return "" if parent == task.parent_run else f"run {parent[:SHORT]}"
    return _ANOTHER


class _Holder:
    """The Ray actor whose name is the lease. It lives until it is killed or the process that created it ends."""

    async def wait(self) -> None:
        await asyncio.Event().wait()


@contextmanager
def _lease(task: StepTask, busy: Callable[[], None]) -> Iterator[None]:
    """Hold the lease of a fingerprint on a shared cluster. A private Ray session has no other user, so no lease."""
    if not task.shared_cluster:
        yield
        return
    name = f"edt-{task.kind}-{task.fingerprint}"
    holder: Any = None
    while holder is None:
        try:
            holder = ray.remote(_Holder).options(name=name, num_cpus=0).remote()
        except ValueError:  # the name is in use: wait until its actor ends
            busy()
            try:
                ray.get(ray.get_actor(name).wait.remote())
            except (ValueError, RayActorError):
                continue
    try:
        yield
    finally:
        ray.kill(holder)


def _execute(task: StepTask, inputs: Mapping[str, Input]) -> Artifact:
    """Compute the artifact under an MLflow child run, commit it, and record it."""
    catalog = task.catalog
    os.environ["MLFLOW_TRACKING_URI"] = catalog.tracking_uri  # for `models:/` URIs inside the job
    with quick_http():
        run_id = with_patience(lambda: catalog.step_run(task.name, task.kind, task.fingerprint, task.parent_run))
        mirror = _mirror(task, run_id)
        record = RunRecord(catalog, run_id, mirror)
        try:
            with_patience(lambda: _record_start(task, run_id, inputs))
            progress = BoardProgress(task.name, task.board)
            with Delivery(task.board, task.name, record):
                out = task.store.writer(task.kind, task.fingerprint)
                artifact = task.stage.execute(task.config, inputs, out, progress, mlflow_run_id=run_id)
            with_patience(lambda: close_run(record, artifact))
        except BaseException as error:
            cause = cause_of(error)
            with suppress(Exception):  # the step's own error is raised instead
                with_patience(lambda: _close_failed(catalog, run_id, cause), _RECORD_FAILURE_S)
            raise
        finally:
            if mirror is not None:
                mirror.close(failed=sys.exc_info()[0] is not None)
    return artifact


def _mirror(task: StepTask, run_id: str) -> WandbMirror | None:
    """The step's run in W&B, if the pipeline has a project there. Its problems are warnings of the step."""
    if task.wandb is None:
        return None
    return WandbMirror(
        task.wandb, run_id, task.name, result_fields(task.config), BoardProgress(task.name, task.board).warn
    )


def _record_start(task: StepTask, run_id: str, inputs: Mapping[str, Input]) -> None:
    """Log the step's parameters and inputs."""
    task.catalog.log_params(run_id, result_fields(task.config))
    for item in inputs.values():
        if isinstance(item, Artifact) and item.manifest.kind in DATASET_KINDS:
            task.catalog.record_input(run_id, item)


def close_run(record: RunRecord, artifact: Artifact) -> None:
    """Record the artifact of a step, and end its run."""
    record.artifact(artifact)
    record.catalog.end_run(record.run_id, "FINISHED")


def _close_failed(catalog: Catalog, run_id: str, error: BaseException) -> None:
    """End the run of a step without an artifact: KILLED if it stopped on request, otherwise FAILED."""
    stopped = isinstance(error, Stopped)
    tags = {"edt.stopped": str(error)} if stopped else {"edt.error": f"{type(error).__name__}: {error}"}
    catalog.set_tags(run_id, {key: value[:4000] for key, value in tags.items()})
    catalog.end_run(run_id, "KILLED" if stopped else "FAILED")


def needs_of(inputs: Mapping[str, "StepFuture | Source"]) -> tuple[str, ...]:
    """The names of the steps that inputs come from."""
    known = [item for item in inputs.values() if isinstance(item, StepFuture | Source)]
    return tuple(item.name if isinstance(item, StepFuture) else "source" for item in known)


def input_fingerprints(inputs: Mapping[str, "StepFuture | Source"]) -> dict[str, str]:
    """Role -> fingerprint of the input."""
    return {role: item.fingerprint for role, item in inputs.items()}
