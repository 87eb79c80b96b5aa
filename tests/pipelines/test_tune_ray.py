"""The trials of `edt tune` on Ray Tune: side by side, and what becomes of those that fail and diverge."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import Section
from edt_core.errors import DivergedError, UserError
from edt_core.progress import Progress
from edt_core.store.artifact import ArtifactWriter, Source
from edt_core.store.store import Store
from jobs.stages.stage import Stage
from pipelines.studies.tune.trials import Trials, TrialWorkflow, loss_of, room_at_once
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

LIMIT_S = 600.0  # for what never comes
DIVERGES, WRONG = "diverges", "wrong"


def attempt(config: Section, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress) -> dict[str, Any]:
    """Diverge, fail, or meet another trial at the place that the source names."""
    source = inputs["source"]
    if source.location == DIVERGES:
        raise DivergedError("the loss of step 3 is not finite")
    if source.location == WRONG:
        raise UserError("lr is wrong")
    place, until = Path(source.location), time.monotonic() + LIMIT_S
    (place / out.fingerprint).touch()
    while len(list(place.iterdir())) < 2:
        assert time.monotonic() < until, "nobody came"
        time.sleep(0.02)
    return {"holdout": {"loss": int(source.fingerprint[0]) / 10}}


ATTEMPTS = Stage("attempts", "images", 1, Section, attempt, roles=("source",))


def workflow_in(store: Store, catalog: Catalog) -> TrialWorkflow:
    return TrialWorkflow(store, catalog, catalog.start_run("search", {}), Terminal(), connect=lambda: False)


def test_trials_run_side_by_side_and_each_has_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (place := tmp_path / "place").mkdir()
    store = Store.open(str(tmp_path / "store"))
    catalog = Catalog.open(store.root, "search")
    sources = {"a": (place, "1"), "b": (place, "2"), "c": (DIVERGES, "3"), "d": (WRONG, "4")}
    for again in (False, True):
        workflow = workflow_in(store, catalog)
        workflow.trials = Trials()
        steps = {
            name: workflow.step(name, ATTEMPTS, Section(), source=Source(str(where), digit * 64))
            for name, (where, digit) in sources.items()
            if not again or name in "ab"
        }
        if not again:
            workflow.trials.start(room_at_once(1, 1.0, 0.0, None))
        workflow.wait(*steps.values())
        workflow.trials.close()
        found = {name: loss_of(artifact) for name, artifact in workflow.artifacts().items()}
        assert found == {"a": 0.1, "b": 0.2}
        assert all(step.reused for step in steps.values()) == again
        if not again:
            assert {name: type(error) for name, error in workflow.failures.items()} == {
                "c": DivergedError,
                "d": UserError,
            }
            assert list(workflow.culprits()) == ["d"]
    runs = catalog.client.search_runs([catalog.experiment_id], "tags.`edt.step` LIKE '%'")
    statuses = {run.data.tags["edt.step"]: run.info.status for run in runs}
    assert statuses == {"a": "FINISHED", "b": "FINISHED", "c": "FAILED", "d": "FAILED"}
    assert not list(tmp_path.glob("**/trial_*")), "Ray Tune writes nothing into the store"
