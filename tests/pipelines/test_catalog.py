"""The catalog under races: what SQLite refuses once is tried again, what it always refuses is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from edt_core.storage import Folder
from pipelines.catalog import Catalog, flatten, retried

RACE = """
import sys
from edt_core.storage import Folder
from pipelines.catalog import Catalog
catalog = Catalog.open(Folder.at(sys.argv[1]), "race")
run = catalog.start_run("child", {})
catalog.log_params(run, {"lr": 0.1, "model": {"dim": int(sys.argv[2])}})
for step in range(3):
    catalog.log_metrics(run, {"loss": 1.0 / (step + 1)}, step)
catalog.end_run(run, "FINISHED")
"""


def test_processes_that_open_one_new_store_at_once_all_succeed(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", RACE, str(tmp_path), str(number)] for number in range(8)]
    racers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [racer.communicate()[1] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 8, errors
    catalog = Catalog.open(Folder.at(tmp_path), "race")
    runs = catalog.client.search_runs([catalog.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 8
    assert {run.data.params["model.dim"] for run in runs} == set("01234567")
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
    with pytest.raises(ValueError, match=r"memory://store is remote.*set it to your MLflow server"):
        Catalog.open(Folder.at("memory://store"), "x")


def test_nested_values_become_dotted_names() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2.5}}, "e": "x"}) == {"a.b": 1, "a.c.d": 2.5, "e": "x"}
