"""What a run of the small pipeline leaves in its store and in MLflow's database, while it is at work and afterwards."""

import sqlite3
from contextlib import closing, suppress
from functools import cache
from pathlib import Path

from edt_core.store.artifact import Artifact
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.store import Store
from pipelines.config.schema import load_config
from pipelines.outcome import Outcome
from pipelines.plan import plan
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record
from tests.support.small import MODEL, SMALL, STEPS, start_run

AMPLE_S = 1200  # more than any run of the small pipeline takes
IN_URL, IN_QUERY = "canary-user-31c7", "canary-query-9be2"  # secrets in a configuration
URL = f"https://me:{IN_URL}@127.0.0.1:9/weights.pth?X-Amz-Signature={IN_QUERY}"


def count(database: Path, table: str, where: str = "1") -> int:
    """Rows of a table of MLflow's SQLite file; 0 while there is none."""
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as open_file,
    ):
        return int(open_file.execute(f"SELECT COUNT(*) FROM {table} WHERE {where}").fetchone()[0])
    return 0


def has_tag(key: str, value: str) -> str:
    """The condition that a row of `tags` is this one."""
    return f"key = '{key}' AND value = '{value}'"


def artifact_of(store: Path, outcome: Outcome, step: str, kind: str) -> Artifact:
    """What a step of the small pipeline's model made in a run, such as "sample own", by the run's record."""
    record = read_record(Catalog(outcome.tracking_uri, ""), outcome.run_id)
    return Artifact.open(str(store / kind / record.steps[f"{step.replace(' ', '.')}.{MODEL}"]))


def versions(store: Path, model: str = MODEL) -> int:
    """Versions that are registered of a model."""
    return count(store / "mlflow.db", "model_versions", f"name = '{model}' AND current_stage != 'Deleted_Internal'")


@cache
def folders(*assignments: str) -> dict[str, str]:
    """`<kind>/<fingerprint>` of each step of the small pipeline, as a plan tells it."""
    steps = plan(load_config("quickstart", [*SMALL, *assignments], "/nowhere/edt-store"))
    return {step.step: f"{step.kind}/{step.fingerprint}" for step in steps}


def finish(store: Path, *assignments: str, **env: str) -> str:
    """Run to the end in a process; returns what it printed."""
    process = start_run(store, *assignments, **env)
    text = process.communicate(timeout=AMPLE_S)[0]
    assert process.returncode == 0, text
    assert "Traceback" not in text, text
    return text


def digests(store: Path | str) -> dict[str, str]:
    """Content digest by kind and fingerprint; the report tells runs and times and is left out."""
    found = Store.open(str(store)).artifacts()
    return {f"{a.manifest.kind}/{a.fingerprint}": a.manifest.digest for a in found if a.manifest.kind != "report"}


def artifacts_of(run: Outcome, store: Path) -> list[Artifact]:
    """What one run made or reused, of a store that others may have used as well."""
    tags = Catalog(run.tracking_uri, "").client.get_run(run.run_id).data.tags
    own = {value for key, value in tags.items() if key.startswith("edt.step.")}
    return [artifact for artifact in Store.open(str(store)).artifacts() if artifact.fingerprint in own]


def digests_of_run(run: Outcome, store: Path) -> dict[str, str]:
    """The digests of one run."""
    own = {artifact.fingerprint for artifact in artifacts_of(run, store)}
    found = {name: digest for name, digest in digests(store).items() if name.partition("/")[2] in own}
    assert len(found) == STEPS - 1
    return found


def assert_once(store: Path, restarted: bool = False, model: str = MODEL) -> None:
    """Every artifact is whole and was made by one finished MLflow run; one version is registered."""
    for path in store.glob(f"*/*/{MANIFEST_NAME}"):
        artifact = Artifact.open(str(path.parent))
        assert artifact.problems(deep=True) == []
        if not restarted:
            assert len([p for p in path.parent.iterdir() if p.is_dir()]) == 1, "a second attempt was made"
        made = f"run_uuid IN (SELECT run_uuid FROM tags WHERE {has_tag('edt.fingerprint', artifact.fingerprint)})"
        assert count(store / "mlflow.db", "runs", f"status = 'FINISHED' AND {made}") == 1, artifact.manifest.kind
    assert versions(store, model) == 1


def holding(folder: Path, *canaries: str) -> list[Path]:
    """Files below a folder that hold one of these texts."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 3, f"{folder} holds nothing to look at"
    return [path for path in files if any(canary.encode() in path.read_bytes() for canary in canaries)]
