"""The catalog under races: what SQLite refuses once is tried again, what it always refuses is told."""

from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.store.folder import Folder
from pipelines.tracking.catalog import Catalog, flatten, retried
from tests.support.races import at_once, log_run


@pytest.mark.extern
@pytest.mark.parametrize("processes", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_that_open_one_new_store_at_once_all_succeed(tmp_path: Path, processes: int) -> None:
    at_once(log_run, processes, tmp_path)
    catalog = Catalog.open(Folder.at(tmp_path), "race")
    runs = catalog.client.search_runs([catalog.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * processes
    assert {run.data.params["model.dim"] for run in runs} == set(map(str, range(processes)))
    for run in runs:
        assert [m.step for m in catalog.client.get_metric_history(run.info.run_id, "loss")] == [0, 1, 2]


def test_a_race_is_tried_again_and_a_real_refusal_is_raised() -> None:
    from mlflow.exceptions import MlflowException

    calls = []

    def third_time_lucky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise MlflowException("UNIQUE constraint failed")
        return "done"

    assert retried(third_time_lucky) == "done"
    with pytest.raises(MlflowException, match="never"):
        retried(lambda: (_ for _ in ()).throw(MlflowException("never")), attempts=2)


def test_a_remote_store_needs_a_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match=r"memory://store is remote.*set MLFLOW_TRACKING_URI to your MLflow server"):
        Catalog.open(Folder.at("memory://store"), "x")


def test_a_deleted_experiment_is_told_with_the_command_that_restores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = Folder.at(tmp_path / "my store")
    (tmp_path / "my store").mkdir()
    catalog = Catalog.open(folder, "mine")
    catalog.client.delete_experiment(catalog.experiment_id)
    with pytest.raises(UserError, match="the MLflow experiment 'mine'") as caught:
        Catalog.open(folder, "mine")
    command = f"mlflow experiments restore --experiment-id {catalog.experiment_id}"
    assert f"MLFLOW_TRACKING_URI='{catalog.tracking_uri}' {command}" in str(caught.value)
    catalog.client.restore_experiment(catalog.experiment_id)
    assert Catalog.open(folder, "mine") == catalog


def test_nested_values_become_dotted_names() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2.5}}, "e": "x"}) == {"a.b": 1, "a.c.d": 2.5, "e": "x"}
