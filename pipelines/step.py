"""The durable step: computed once, found again by its fingerprint.

A step runs as a Ray task. Inside, a Ray actor named after the fingerprint does the work: two runs on one cluster that
want the same artifact meet at that actor, the first computes it, the second finds it committed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from edt_core.artifact import Artifact, Source
from edt_core.config import Section, result_fields
from jobs.verb import Input, Verb
from pipelines.artifacts import Store
from pipelines.catalog import DATASET_KINDS, Catalog
from pipelines.terminal import StepProgress

_MEETINGS = 5  # how often a step whose shared actor died with another run is taken up again


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
    """Run one step, or wait for the run that is at it and take its artifact."""
    for meeting in range(_MEETINGS):
        actor: Any = _RemoteStep.options(
            name=f"edt-{task.kind}-{task.fingerprint}", get_if_exists=True, num_cpus=0
        ).remote()
        try:
            artifact: Artifact = ray.get(actor.run.remote(task, dict(inputs)))
            return artifact
        except (ActorDiedError, ActorUnavailableError):
            if meeting == _MEETINGS - 1:
                raise
    raise AssertionError("unreachable")


class _StepActor:
    """Runs a step where its artifact is not committed yet."""

    def run(self, task: StepTask, inputs: Mapping[str, Input]) -> Artifact:
        with task.store.lock(task.kind, task.fingerprint):
            if found := task.store.find(task.kind, task.fingerprint):
                return found
            return _execute(task, inputs)


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


_RemoteStep: Any = ray.remote(_StepActor)


def input_fingerprints(inputs: Mapping[str, "StepFuture | Source"]) -> dict[str, str]:
    return {role: item.fingerprint for role, item in inputs.items()}
