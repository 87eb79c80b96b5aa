"""The catalog: what ran, from what, to what, in MLflow. Runs are opened by id, never by process: a restart goes on."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from edt_core.artifact import Artifact, canonical_json
from edt_core.environment import code_version
from edt_core.errors import UserError
from edt_core.storage import Folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MAX_PARAM = 500  # characters MLflow keeps of a parameter on every back end
DATASET_KINDS = ("images", "latents")


@dataclass(frozen=True)
class Catalog:
    """An MLflow tracking server and one experiment of it. Picklable: every worker opens its own client."""

    tracking_uri: str
    experiment_id: str

    @classmethod
    def open(cls, store: Folder, experiment: str) -> "Catalog":
        """MLflow at MLFLOW_TRACKING_URI, or else a SQLite file inside the store, set up once under a lock.

        Raises UserError for a remote store without a tracking server.
        """
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri:
            return cls(uri, _experiment(uri, experiment, None))
        if (root := store.local) is None:
            raise UserError(
                f"the store {store.uri} is remote, and MLFLOW_TRACKING_URI is not set: a SQLite file cannot live in an "
                "object store; set it to your MLflow server"
            )
        # Several processes that create the tables of one new SQLite file at once fail; after that they get along.
        with FileLock(root / ".mlflow.lock"):
            uri = f"sqlite:///{root / 'mlflow.db'}"
            return cls(uri, _experiment(uri, experiment, (root / "mlartifacts").as_uri()))

    @cached_property
    def client(self) -> "MlflowClient":
        return _client(self.tracking_uri)

    def start_run(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Open a run and return its id."""
        links = {"mlflow.parentRunId": parent} if parent else {}
        version = {"edt.code_version": code_version()}
        run = self.client.create_run(self.experiment_id, run_name=name, tags={**version, **tags, **links})
        return str(run.info.run_id)

    def end_run(self, run_id: str, status: str) -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def end_children(self, parent: str, status: str) -> None:
        """Close the runs of steps that ended with their parent and could not close them."""
        running = f"tags.mlflow.parentRunId = '{parent}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([self.experiment_id], running):
            self.end_run(run.info.run_id, status)

    def log_metrics(self, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
        """Log finite values at an explicit step."""
        import math

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(k, float(v), now, step) for k, v in values.items() if math.isfinite(v)]
        self.client.log_batch(run_id, metrics=metrics)

    def log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Log a nested mapping as dotted parameters."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_MAX_PARAM]) for key, value in flatten(values).items()]
        for start in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[start : start + 100])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self.client.log_text(run_id, text, name)

    def record_artifact(self, run_id: str, artifact: Artifact) -> None:
        """Tag a run with the artifact it made, and log its counts as metrics."""
        manifest = artifact.manifest
        self.set_tags(run_id, artifact_tags(artifact))
        numbers = {k: v for k, v in flatten(manifest.counts).items() if isinstance(v, int | float)}
        self.log_metrics(run_id, {**numbers, "duration_s": manifest.duration_s})
        if manifest.kind == "checkpoint":
            self._record_checkpoints(run_id, artifact)

    def record_input(self, run_id: str, artifact: Artifact) -> None:
        """Log an images or latents artifact as a dataset that a run read."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=f"{artifact.manifest.kind}-{artifact.fingerprint[:12]}",
            digest=artifact.manifest.digest[:32],
            source_type="edt",
            source=canonical_json({"uri": artifact.folder.uri, "fingerprint": artifact.fingerprint}),
            profile=canonical_json({k: v for k, v in artifact.counts.items() if isinstance(v, int)}),
        )
        tag = InputTag("mlflow.data.context", "input")
        # Two steps that read one new dataset at the same moment both try to insert it.
        retried(lambda: self.client.log_inputs(run_id, [DatasetInput(dataset, [tag])]))

    def _record_checkpoints(self, run_id: str, artifact: Artifact) -> None:
        """Each kept checkpoint as an MLflow logged model with its step, the training's metrics linked to it."""
        from jobs.train import history

        by_step = {int(row["step"]): row for row in history(artifact)}
        for name in artifact.counts["checkpoints"]:
            step = int(name.rsplit("-", 1)[1])
            tags = {
                "edt.uri": f"{artifact.data.uri}/checkpoints/{name}",
                "edt.digest": artifact.manifest.digest,
            }
            model = self.client.create_logged_model(
                self.experiment_id, name=name, source_run_id=run_id, tags=tags, params={"step": str(step)}
            )
            self.client.finalize_logged_model(model.model_id, "READY")
            for key, value in by_step.get(step, {}).items():
                if key != "step":
                    self.client.log_metric(run_id, key, value, step=step, model_id=model.model_id)


def retried(call: Callable[[], Any], attempts: int = 5) -> Any:
    """Call MLflow again after a race with another writer; the last error is raised."""
    from mlflow.exceptions import MlflowException

    for attempt in range(attempts):
        try:
            return call()
        except MlflowException:
            if attempt == attempts - 1:
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError("unreachable")


def artifact_tags(artifact: Artifact) -> dict[str, str]:
    """The tags by which an artifact is found in MLflow."""
    return {
        "edt.kind": artifact.manifest.kind,
        "edt.fingerprint": artifact.fingerprint,
        "edt.uri": artifact.folder.uri,
        "edt.digest": artifact.manifest.digest,
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, bool | list | tuple) or prefix:
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _client(uri: str) -> "MlflowClient":
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def _experiment(uri: str, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location))
    except MlflowException:  # another process made it a moment ago
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise
