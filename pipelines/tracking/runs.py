"""Workflow runs in MLflow: the list of runs, and the record that reproduces one."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from edt_core.environment import utc
from edt_core.errors import UserError
from edt_core.files.small_files import read_json, read_text
from edt_core.files.yaml_text import parse_yaml
from pipelines.tracking.catalog import Catalog, paged

RUN_ID = re.compile("[0-9a-f]{4,32}")  # a run's id, or its beginning
_ID_DIGITS = 32
SEARCH_TAG = "edt.search"  # of a workflow run: the model whose recipe it searches
_STEP = "edt.step."
_RECORDED = ("config.yaml", "environment.json")  # artifacts of a workflow run
_PAGE = 500
_BATCH = 200  # run ids per request


@dataclass(frozen=True)
class Record:
    """The record of one workflow run. `steps`: step, with dots for spaces -> fingerprint."""

    run_id: str
    status: str
    tags: Mapping[str, str]
    config: Mapping[str, Any]
    environment: Mapping[str, str]

    @property
    def steps(self) -> dict[str, str]:
        return steps_of(self.tags)


def step_tag(name: str) -> str:
    """The tag of a workflow run with the fingerprint of a step: the step's name, with dots for spaces."""
    return _STEP + name.replace(" ", ".")


def steps_of(tags: Mapping[str, str]) -> dict[str, str]:
    """The fingerprints of a workflow run's steps, from its tags."""
    return {key.removeprefix(_STEP): value for key, value in tags.items() if key.startswith(_STEP)}


def workflow_runs(catalog: Catalog) -> Iterator[Any]:
    """All workflow runs of all experiments, newest first, as MLflow objects."""
    return search(catalog, "tags.`edt.workflow` LIKE '%'")


def search(catalog: Catalog, mlflow_filter: str, deleted: bool = False) -> Iterator[Any]:
    """The runs of all experiments that match an MLflow filter, newest first; with `deleted`, also deleted runs."""
    from mlflow.entities import ViewType

    order, ids = ["attributes.start_time DESC"], experiments(catalog)
    view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
    request = catalog.client.search_runs
    return paged(lambda token: request(ids, mlflow_filter, view, max_results=_PAGE, order_by=order, page_token=token))


def experiments(catalog: Catalog) -> list[str]:
    """Ids of all experiments, including deleted ones."""
    from mlflow.entities import ViewType

    return [e.experiment_id for e in catalog.client.search_experiments(ViewType.ALL, max_results=10_000)]


def runs_of(catalog: Catalog, ids: Iterable[str]) -> dict[str, Any]:
    """Runs by id, including deleted ones, without those that MLflow no longer has."""
    from mlflow.entities import ViewType

    run_ids, experiment_ids = sorted(ids), experiments(catalog)
    runs: dict[str, Any] = {}
    for start in range(0, len(run_ids), _BATCH):
        quoted = ", ".join(f"'{run_id}'" for run_id in run_ids[start : start + _BATCH])
        run_filter = f"attributes.run_id IN ({quoted})"
        page = catalog.client.search_runs(experiment_ids, run_filter, ViewType.ALL, max_results=_BATCH)
        runs |= {run.info.run_id: run for run in page}
    return runs


def run_rows(catalog: Catalog, wanted: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest workflow runs, of one pipeline or all, as table rows.

    `wanted`: the name of a pipeline, or the id of a run or of a step's run, of which the beginning is enough.
    """
    runs = (run for run in workflow_runs(catalog) if wanted in (None, run.data.tags["edt.workflow"]))
    rows = [_row(run) for run, _ in zip(runs, range(limit), strict=False)]
    if rows or wanted is None or not RUN_ID.fullmatch(wanted):
        return rows
    return [_row(run) for run in [_workflow_run(catalog, wanted)] if run is not None]


def _workflow_run(catalog: Catalog, text: str) -> Any | None:
    """The workflow run of this id, or to which the step's run of this id belongs; None if there is none."""
    run = runs_of(catalog, [run_id]).get(run_id) if (run_id := whole_run_id(catalog, text)) else None
    parent = None if run is None else run.data.tags.get("mlflow.parentRunId")
    run = runs_of(catalog, [parent]).get(parent) if parent else run
    return run if run is not None and "edt.workflow" in run.data.tags else None


def whole_run_id(catalog: Catalog, text: str) -> str | None:
    """The id of the one run that begins with `text`; None if there is none. Raises UserError if there are several."""
    if len(text) == _ID_DIGITS or not RUN_ID.fullmatch(text):
        return text
    matches = [str(run.info.run_id) for run in search(catalog, "") if run.info.run_id.startswith(text)]
    if len(matches) > 1:
        raise UserError(
            f"{len(matches)} runs have an id that begins with {text}: {', '.join(matches[:5])}; give more digits"
        )
    return matches[0] if matches else None


def _row(run: Any) -> dict[str, Any]:
    info, tags = run.info, run.data.tags
    seconds = (info.end_time - info.start_time) / 1000 if info.end_time else None
    return {
        "run": info.run_id,
        "pipeline": tags["edt.workflow"],
        "status": info.status,
        "started": utc(info.start_time / 1000),
        "seconds": seconds,
        "reused": _count(tags.get("edt.reused")),
        "executed": _count(tags.get("edt.executed")),
        "code": tags.get("edt.code_version"),
        "source": tags.get("edt.source"),
        "steps": steps_of(tags),
        "failed": tags.get("edt.failed", ""),
    }


def _count(names: str | None) -> int:
    return len(names.split(", ")) if names else 0


def read_record(catalog: Catalog, run_id: str) -> Record:
    """The record of a workflow run. Raises UserError if MLflow has none, or if it is incomplete."""
    from mlflow.exceptions import MlflowException

    try:
        run_id = whole_run_id(catalog, run_id) or run_id
        run = catalog.client.get_run(run_id)
    except MlflowException as error:
        raise UserError(f"MLflow has no run {run_id} ({error.error_code}); `edt runs` lists the runs") from error
    if "edt.workflow" not in run.data.tags:
        parent = run.data.tags.get("mlflow.parentRunId")
        other = f"it is a step of the run {parent}; give that one" if parent else "`edt runs` lists those"
        raise UserError(f"the run {run_id} is not a run of a whole pipeline; {other}")
    if SEARCH_TAG in run.data.tags:
        raise UserError(
            f"the run {run_id} is a search of edt tune, not a run of a whole pipeline; give its command again: trials "
            "that finished are reused"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="edt-") as folder:
            # With the client: `mlflow-artifacts:` addresses refer to this catalog's server, not the environment's.
            paths = [catalog.client.download_artifacts(run_id, name, folder) for name in _RECORDED]
            config, environment = parse_yaml(read_text(paths[0])), read_json(paths[1])
    except (MlflowException, OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot reproduce the run {run_id}: config.yaml or environment.json among its artifacts is missing or "
            f"invalid ({error}). An earlier version of edt made the run, or the files were removed or damaged"
        ) from error
    return Record(run_id, run.info.status, dict(run.data.tags), config, environment)


def artifact_runs(catalog: Catalog, fingerprints: set[str]) -> dict[str, Any]:
    """The newest finished MLflow run of each artifact, by fingerprint."""
    runs: dict[str, Any] = {}
    for run in search(catalog, "tags.`edt.fingerprint` LIKE '%' and attributes.status = 'FINISHED'"):
        identity = run.data.tags["edt.fingerprint"]
        if identity in fingerprints and "edt.digest" in run.data.tags:
            runs.setdefault(identity, run)
    return runs
