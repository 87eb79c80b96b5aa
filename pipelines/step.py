"""The durable step: computed once, found again by its fingerprint.

A step runs as a Ray task. Two runs that want the same artifact at the same time compute it once: on a shared cluster
they meet at a Ray actor named after the fingerprint, and where the store is a local folder at a file lock as well.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from edt_core.artifact import Artifact, Source
from edt_core.config import Section, result_fields
from jobs.verb import Input, Verb
from pipelines.artifacts import Store
from pipelines.catalog import DATASET_KINDS, Catalog
from pipelines.terminal import StepProgress


@dataclass(frozen=True)
class StepTask:
    """All that a worker needs to run one step, but for its input artifacts, which arrive when they are made."""

    name: str
    verb: Verb
    config: Section
    fingerprint: str
    store: Store
    catalog: Catalog
    parent_run: str
    board: Any
    shared_cluster: bool

    @property
    def kind(self) -> str:
        return self.verb.kind


@dataclass(frozen=True)
class StepFuture:
    """An artifact that is there (`artifact`) or being made (`ref`). Passed to a next step as its input."""

    name: str
    kind: str
    fingerprint: str
    needs: tuple[str, ...] = ()  # names of the steps its inputs come from
    artifact: Artifact | None = None
    ref: Any = None

    @property
    def reused(self) -> bool:
        return self.artifact is not None

    def result(self) -> Artifact:
        """The artifact, once it is made. Raises what its step, or one before it, raised."""
        found: Artifact = self.artifact if self.artifact is not None else ray.get(self.ref)
        return found


def run_step(task: StepTask, inputs: Mapping[str, Input]) -> Artifact:
    """Make one step's artifact, or wait for the run that is at it and take what it made."""
    with task.store.lock(task.kind, task.fingerprint), _lease(task):
        return task.store.find(task.kind, task.fingerprint) or _execute(task, inputs)


class _Holder:
    """The Ray actor whose name is the lease. It lives as long as the process that made it, or until it is killed."""

    async def wait(self) -> None:
        await asyncio.Event().wait()


@contextmanager
def _lease(task: StepTask) -> Iterator[None]:
    """Hold the fingerprint on this cluster. A Ray session of our own needs no lease: nobody else is in it."""
    if not task.shared_cluster:
        yield
        return
    name = f"edt-{task.kind}-{task.fingerprint}"
    holder: Any = None
    while holder is None:
        try:
            holder = ray.remote(_Holder).options(name=name, num_cpus=0).remote()
        except ValueError:  # the name is taken: wait until its actor is gone, by release or by death
            try:
                ray.get(ray.get_actor(name).wait.remote())
            except (ValueError, RayActorError):
                continue
    try:
        yield
    finally:
        ray.kill(holder)


def _execute(task: StepTask, inputs: Mapping[str, Input]) -> Artifact:
    """Do the work under an MLflow child run, commit the artifact, and record it."""
    catalog = task.catalog
    tags = {"edt.kind": task.kind, "edt.fingerprint": task.fingerprint, "edt.step": task.name}
    run_id = catalog.start_run(task.name, tags, parent=task.parent_run)
    os.environ["MLFLOW_TRACKING_URI"] = catalog.tracking_uri  # for `models:/` URIs inside the job
    try:
        catalog.log_params(run_id, result_fields(task.config))
        for item in inputs.values():
            if isinstance(item, Artifact) and item.manifest.kind in DATASET_KINDS:
                catalog.record_input(run_id, item)
        progress = StepProgress(task.name, task.board, catalog, run_id)
        out = task.store.writer(task.kind, task.fingerprint)
        artifact = task.verb.execute(task.config, inputs, out, progress, mlflow_run_id=run_id)
        catalog.record_artifact(run_id, artifact)
    except BaseException as error:
        catalog.set_tags(run_id, {"edt.error": f"{type(error).__name__}: {error}"[:4000]})
        catalog.end_run(run_id, "FAILED")
        raise
    catalog.end_run(run_id, "FINISHED")
    return artifact


def input_fingerprints(inputs: Mapping[str, "StepFuture | Source"]) -> dict[str, str]:
    return {role: item.fingerprint for role, item in inputs.items()}
