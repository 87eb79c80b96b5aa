"""The catalog: what ran, from what, to what, in MLflow. Runs are opened by id, never by process: restarts continue."""

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

_MAX_PARAM = 500  # characters MLflow keeps of a parameter on every back end
_SETUP_LOCK = int.from_bytes(b"edt", "big")  # the key of PostgreSQL's advisory lock
_log = logging.getLogger(__name__)
DATASET_KINDS = ("images", "latents")


class NoRecordError(UserError):
    """A store has no MLflow record yet, and no server is named."""


@dataclass(frozen=True)
class Catalog:
    """An MLflow tracking server and one experiment of it. Picklable: every worker opens its own client."""

    tracking_uri: str
    experiment_id: str

    @classmethod
    def open(cls, store: Folder, experiment: str, tracking_uri: str | None = None) -> "Catalog":
        """MLflow at `tracking_uri` or MLFLOW_TRACKING_URI, or a SQLite file in the store, set up once under a lock.

        A server's own database is set up by the server; one that is named here itself (postgresql://), by the first
        that comes. Raises UserError for a remote store without a tracking server.
        """
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri and uri != own_uri(store):
            check_mlflow(uri)
            with _alone_at(uri):
                return cls(uri, _experiment(uri, experiment, None))
        if (root := store.local) is None:
            raise UserError(
                f"the store {store.uri} is remote, and MLFLOW_TRACKING_URI is not set: a SQLite file cannot live in an "
                "object store; set it to your MLflow server"
            )
        # Several processes that create the tables of one new SQLite file at once fail; after that they get along.
        with FileLock(root / ".mlflow.lock"):
            uri, artifacts = own_uri(store), (root / "mlartifacts").as_uri()
            if not (root / SQLITE).exists():
                _set_up(uri, artifacts)
            return cls(uri, _experiment(uri, experiment, artifacts))

    @classmethod
    def existing(cls, store: Folder, tracking_uri: str | None = None) -> "Catalog":
        """MLflow at `tracking_uri` or MLFLOW_TRACKING_URI, or else the SQLite file that is in the store already.

        For look-ups over all experiments: it makes nothing. Raises NoRecordError where there is no MLflow, and
        UserError for one that is silent.
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
        """The tracking URI as it may be shown: without a password."""
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
        """The run of a step: the unfinished one of its fingerprint, gone on with, or else a new one. Returns its id.

        So a step has one run, whatever the number of times that it was started.
        """
        tags = {"edt.kind": kind, "edt.fingerprint": fingerprint, "edt.step": name}
        same = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in ("edt.kind", "edt.fingerprint"))
        unfinished = f"{same} and attributes.status != 'FINISHED'"
        found = self.client.search_runs(
            [self.experiment_id], unfinished, max_results=1, order_by=["attributes.start_time DESC"]
        )
        if not found:
            return self.start_run(name, tags, parent)
        run_id, there = str(found[0].info.run_id), found[0].data.tags
        for key in {"edt.error", "edt.stopped"} & set(there):
            self.client.delete_tag(run_id, key)
        restarts = str(int(there.get("edt.restarts", "0")) + 1)
        version = {"edt.code_version": code_version(), "edt.restarts": restarts, "mlflow.parentRunId": parent}
        self.set_tags(run_id, {**tags, **version})
        self.client.update_run(run_id, status="RUNNING", name=name)
        return run_id

    def unfinished_runs(self) -> set[str]:
        """Ids of the runs of steps that are not FINISHED."""
        wanted = "tags.`edt.fingerprint` LIKE '%' and attributes.status != 'FINISHED'"
        pages = paged(lambda token: self.client.search_runs([self.experiment_id], wanted, page_token=token))
        return {str(run.info.run_id) for run in pages}

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
        """Log a nested mapping as dotted parameters; those that the run has already stay as they are."""
        from mlflow.entities import Param

        there = self.client.get_run(run_id).data.params
        params = [
            Param(key, redacted(str(value))[:_MAX_PARAM]) for key, value in flatten(values).items() if key not in there
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
        # Two steps that read one new dataset at the same moment both try to insert it.
        retried(lambda: self.client.log_inputs(run_id, [DatasetInput(dataset, [tag])]))


@contextmanager
def tracking_kept() -> Iterator[None]:
    """Puts MLFLOW_TRACKING_URI back: `mlflow.set_tracking_uri` sets it for all that comes after in this process."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        yield
    finally:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def paged(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """What MLflow lists page by page: `ask(token)` gives one, `None` the first."""
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


def retried(call: Callable[[], Any], attempts: int = 5) -> Any:
    """Call MLflow again after a race with another writer; the last error is raised."""
    from mlflow.exceptions import MlflowException

    for attempt in range(attempts):
        try:
            return call()
        except MlflowException as error:
            if attempt == attempts - 1:
                raise
            _log.debug("MLflow is asked again (%s)", error)
            time.sleep(0.1 * 2**attempt * random.uniform(0.5, 1))  # those that met once should not meet again
    raise AssertionError("unreachable")


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
    _quiet()
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def _quiet() -> None:
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextmanager
def _alone_at(uri: str) -> Iterator[None]:
    """Of several processes, on any machines, that open one PostgreSQL database, one at a time.

    The first makes the tables; two that make them at once both fail. The lock goes with its connection.
    """
    if not _is_postgresql(uri):
        yield
        return
    from sqlalchemy import text

    with _connected(uri) as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _SETUP_LOCK})
        yield


def check_tracking(tracking_uri: str | None = None) -> None:
    """Raise UserError where the MLflow that is named, here or by MLFLOW_TRACKING_URI, is silent; without one, nothing.

    A server that refuses connections is waited for by its client; a database that does is a UserError.
    """
    if uri := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        check_mlflow(uri)
        if _is_postgresql(uri):
            _connected(uri).close()


def _is_postgresql(uri: str) -> bool:
    return uri.startswith("postgresql")


def _connected(uri: str) -> Any:
    """A connection to a database. Raises UserError where it does not answer, or not in time."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.pool import NullPool

    # Without a transaction: one that is open for long would hold up migrations.
    engine = create_engine(uri, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    remedy = "start the database, or mend MLFLOW_TRACKING_URI (--tracking-uri)"
    try:
        return check_connects(engine.connect, uri, "a PostgreSQL database", remedy)
    except OperationalError as error:
        raise UserError(f"the database of MLFLOW_TRACKING_URI does not answer: {error.orig}") from error


def _set_up(uri: str, artifacts: str) -> None:
    """Make the tables of a new SQLite file, with artifacts in the store.

    MLflow's client would take the working folder for them, and put its name into SQL as it is: a quote or a colon in it
    is an error.
    """
    _quiet()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifacts)


def _deleted(uri: str, name: str, experiment_id: str) -> str:
    """What to do about an experiment that MLflow keeps as deleted: its name stays taken."""
    return (
        f"the MLflow experiment {name!r} (id {experiment_id}) was deleted, so it takes no runs. Restore it:\n"
        f"  MLFLOW_TRACKING_URI={quote(redacted(uri))} mlflow experiments restore --experiment-id {experiment_id}\n"
        "or give the pipeline another name (--set name=...)"
    )


def _experiment(uri: str, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage == "deleted":
            raise UserError(_deleted(uri, name, str(found.experiment_id)))
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location))
    except MlflowException:  # another process made it a moment ago
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise
