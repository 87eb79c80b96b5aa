"""The catalog: the record of runs, inputs and outputs in MLflow. Runs are opened by id, so restarts continue them."""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from shlex import quote
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from edt_core.environment import code_version
from edt_core.errors import UserError
from edt_core.network.answers import check_connects, check_mlflow
from edt_core.printing.redaction import redacted, redacted_values
from edt_core.store.artifact import Artifact, canonical_json
from edt_core.store.folder import Folder
from jobs.runtime.tracking import SQLITE, own_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MAX_PARAM = 500  # characters of a parameter that every MLflow back end accepts
_SETUP_LOCK = int.from_bytes(b"edt", "big")  # the key of PostgreSQL's advisory lock
_log = logging.getLogger(__name__)
DATASET_KINDS = ("images", "latents")


class NoRecordError(UserError):
    """A store has no MLflow record yet, and no server is configured."""


@dataclass(frozen=True)
class Catalog:
    """An MLflow tracking server and one experiment of it. Picklable: every worker opens its own client."""

    tracking_uri: str
    experiment_id: str

    @classmethod
    def open(cls, store: Folder, experiment: str, tracking_uri: str | None = None) -> "Catalog":
        """MLflow at `tracking_uri` or MLFLOW_TRACKING_URI, or else a SQLite file in the store, set up under a lock.

        A server sets up its own database. A database URI (postgresql://) is set up by the first process. Raises
        UserError for a remote store without a tracking server.
        """
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri and uri != own_uri(store):
            check_mlflow(uri)
            with _alone_at(uri):
                return cls(uri, _experiment(uri, experiment, None))
        if (root := store.local) is None:
            raise UserError(
                f"the store {store.uri} is remote, and MLFLOW_TRACKING_URI is not set: a SQLite file does not work in "
                "an object store; set MLFLOW_TRACKING_URI to your MLflow server"
            )
        # Processes that create the tables of one new SQLite file at the same time fail; later they can share it.
        with FileLock(root / ".mlflow.lock"):
            uri, artifacts = own_uri(store), (root / "mlartifacts").as_uri()
            if not (root / SQLITE).exists():
                _set_up(uri, artifacts)
            return cls(uri, _experiment(uri, experiment, artifacts))

    @classmethod
    def existing(cls, store: Folder, tracking_uri: str | None = None) -> "Catalog":
        """MLflow at `tracking_uri` or MLFLOW_TRACKING_URI, or else the existing SQLite file in the store.

        For look-ups over all experiments; creates nothing. Raises NoRecordError if there is no MLflow, and UserError
        if it does not answer.
        """
        if uri := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
            check_tracking(uri)
            return cls(uri, "")
        if (root := store.local) is None or not (root / SQLITE).exists():
            raise NoRecordError(
                f"there is no MLflow record in the store {store.uri}; give the store of your runs with --store, or "
                "your MLflow server with --tracking-uri or MLFLOW_TRACKING_URI"
            )
        return cls(own_uri(store), "")

    @property
    def place(self) -> str:
        """The tracking URI without its password, for messages."""
        return redacted(self.tracking_uri)

    @cached_property
    def client(self) -> "MlflowClient":
        return _client(self.tracking_uri)

    def start_run(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Open a run and return its id."""
        links = {"mlflow.parentRunId": parent} if parent else {}
        version = {"edt.code_version": code_version()}
        run = self.client.create_run(
            self.experiment_id, run_name=name, tags=redacted_values({**version, **tags, **links})
        )
        return str(run.info.run_id)

    def step_run(self, name: str, kind: str, fingerprint: str, parent: str) -> str:
        """Continue the unfinished run of a step's fingerprint, or else start a new one. Returns its id.

        So a step has one run, however often it was started.
        """
        tags = {"edt.kind": kind, "edt.fingerprint": fingerprint, "edt.step": name}
        same = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in ("edt.kind", "edt.fingerprint"))
        unfinished = f"{same} and attributes.status != 'FINISHED'"
        runs = self.client.search_runs(
            [self.experiment_id], unfinished, max_results=1, order_by=["attributes.start_time DESC"]
        )
        if not runs:
            return self.start_run(name, tags, parent)
        run_id, old_tags = str(runs[0].info.run_id), runs[0].data.tags
        for key in {"edt.error", "edt.stopped"} & set(old_tags):
            self.client.delete_tag(run_id, key)
        restarts = str(int(old_tags.get("edt.restarts", "0")) + 1)
        version = {"edt.code_version": code_version(), "edt.restarts": restarts, "mlflow.parentRunId": parent}
        self.set_tags(run_id, {**tags, **version})
        self.client.update_run(run_id, status="RUNNING", name=name)
        return run_id

    def run_of_step(self, kind: str, fingerprint: str, run_id: str | None) -> Any | None:
        """A step's run by its id; with None, the newest run that is making this artifact now, in any experiment."""
        if run_id is not None:
            return self.client.get_run(run_id)
        same = f"tags.`edt.kind` = '{kind}' and tags.`edt.fingerprint` = '{fingerprint}'"
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        running = f"{same} and attributes.status = 'RUNNING'"
        order = ["attributes.start_time DESC"]
        return next(iter(self.client.search_runs(experiments, running, max_results=1, order_by=order)), None)

    def unfinished_runs(self) -> set[str]:
        """Ids of the runs of steps that are not FINISHED."""
        unfinished = "tags.`edt.fingerprint` LIKE '%' and attributes.status != 'FINISHED'"
        runs = paged(lambda token: self.client.search_runs([self.experiment_id], unfinished, page_token=token))
        return {str(run.info.run_id) for run in runs}

    def end_run(self, run_id: str, status: str) -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def end_children(self, parent: str, status: str) -> None:
        """Close the runs of steps that ended with their parent run and could not close their own."""
        experiment = self.client.get_run(parent).info.experiment_id
        running = f"tags.mlflow.parentRunId = '{parent}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([experiment], running):
            self.end_run(run.info.run_id, status)

    def end_abandoned(self, run_id: str) -> None:
        """Close a workflow run, and those of its steps, as KILLED if its process was killed before it could."""
        from mlflow.exceptions import MlflowException

        try:
            status = self.client.get_run(run_id).info.status
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # the run was deleted
                return
            raise
        if status == "RUNNING":
            self.end_children(run_id, "KILLED")
            self.end_run(run_id, "KILLED")

    def log_metrics(self, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
        """Log finite values at an explicit step."""
        import math

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(k, float(v), now, step) for k, v in values.items() if math.isfinite(v)]
        self.client.log_batch(run_id, metrics=metrics)

    def log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Log a nested mapping as dotted parameters; parameters that the run has already are not changed."""
        from mlflow.entities import Param

        logged = self.client.get_run(run_id).data.params
        params = [
            Param(key, redacted(str(value))[:_MAX_PARAM]) for key, value in flatten(values).items() if key not in logged
        ]
        for start in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[start : start + 100])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, redacted(value)) for key, value in tags.items()])

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self.client.log_text(run_id, redacted(text), name)

    def record_input(self, run_id: str, artifact: Artifact) -> None:
        """Log an images or latents artifact as a dataset that a run read."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=f"{artifact.manifest.kind}-{artifact.fingerprint[:12]}",
            digest=artifact.manifest.digest[:32],
            source_type="edt",
            source=canonical_json({"uri": redacted(artifact.folder.uri), "fingerprint": artifact.fingerprint}),
            profile=canonical_json({k: v for k, v in artifact.counts.items() if isinstance(v, int)}),
        )
        tag = InputTag("mlflow.data.context", "input")
        # Two steps that log the same new dataset at the same time both try to insert it.
        retried(lambda: self.client.log_inputs(run_id, [DatasetInput(dataset, [tag])]))


@contextmanager
def tracking_kept() -> Iterator[None]:
    """Restore MLFLOW_TRACKING_URI on exit: `mlflow.set_tracking_uri` sets it for the rest of the process."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        yield
    finally:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def paged(request: Callable[[str | None], Any]) -> Iterator[Any]:
    """All items of a paged MLflow listing: `request(token)` returns a page, `request(None)` the first."""
    token = None
    while True:
        page = request(token)
        yield from page
        token = page.token
        if not token:
            return


def retried(call: Callable[[], Any], attempts: int = 5) -> Any:
    """Call MLflow, and retry after a race with another writer. Raises the last error."""
    from mlflow.exceptions import MlflowException

    for attempt in range(attempts):
        try:
            return call()
        except MlflowException as error:
            if attempt == attempts - 1:
                raise
            _log.debug("retrying the call to MLflow (%s)", error)
            time.sleep(0.1 * 2**attempt * random.uniform(0.5, 1))  # random, to avoid another race
    raise AssertionError("unreachable")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys. Lists are not flattened."""
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
    _quiet()
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def _quiet() -> None:
    import mlflow  # noqa: F401  it sets the levels of its loggers when it is imported

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextmanager
def _alone_at(uri: str) -> Iterator[None]:
    """Let only one process at a time, on any machine, open a PostgreSQL database.

    The first one creates the tables; two that create them at the same time both fail. The lock ends with the
    connection.
    """
    if not _is_postgresql(uri):
        yield
        return
    from sqlalchemy import text

    with _connected(uri) as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _SETUP_LOCK})
        yield


def check_tracking(tracking_uri: str | None = None) -> None:
    """Raise UserError if the MLflow at `tracking_uri` or MLFLOW_TRACKING_URI, if any, does not answer.

    If a server refuses connections, its client waits for it; if a database does, this raises UserError.
    """
    if uri := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        check_mlflow(uri)
        if _is_postgresql(uri):
            _connected(uri).close()


def _is_postgresql(uri: str) -> bool:
    return uri.startswith("postgresql")


def _connected(uri: str) -> Any:
    """A connection to a database. Raises UserError if it does not answer in time."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.pool import NullPool

    # Without a transaction: a long one would block migrations.
    engine = create_engine(uri, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    remedy = "start the database, or correct MLFLOW_TRACKING_URI (--tracking-uri)"
    try:
        return check_connects(engine.connect, uri, "a PostgreSQL database", remedy)
    except OperationalError as error:
        raise UserError(f"the database of MLFLOW_TRACKING_URI does not answer: {error.orig}") from error


def _set_up(uri: str, artifacts: str) -> None:
    """Create the tables of a new SQLite file, with artifacts in the store.

    MLflow's client would use the working folder for artifacts and insert its name into SQL without quoting: a quote or
    a colon in the name is an error.
    """
    _quiet()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifacts)


def _deleted(uri: str, name: str, experiment_id: str) -> str:
    """The message about an experiment that MLflow keeps as deleted. Its name stays in use."""
    return (
        f"the MLflow experiment {name!r} (id {experiment_id}) was deleted, so it accepts no runs. Restore it:\n"
        f"  MLFLOW_TRACKING_URI={quote(redacted(uri))} mlflow experiments restore --experiment-id {experiment_id}\n"
        "or give the pipeline another name (--set name=...)"
    )


def _experiment(uri: str, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    if experiment := client.get_experiment_by_name(name):
        if experiment.lifecycle_stage == "deleted":
            raise UserError(_deleted(uri, name, str(experiment.experiment_id)))
        return str(experiment.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location))
    except MlflowException:  # another process created it a moment ago
        if experiment := client.get_experiment_by_name(name):
            return str(experiment.experiment_id)
        raise
