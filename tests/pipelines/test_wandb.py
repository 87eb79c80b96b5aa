"""Weights & Biases beside MLflow: off unless a project is set, complete, and never in the way."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from edt_core.config import recorded_fields
from edt_core.errors import UserError
from jobs.runtime.board import Measured
from pipelines.cli import app
from pipelines.config.schema import load_config, recorded_yaml
from pipelines.engine import step
from pipelines.tracking import wandb_mirror
from pipelines.tracking.run_record import RunRecord
from pipelines.tracking.wandb_mirror import WandbMirror, WandbProject, check_wandb
from tests.support.registry import PROTOCOL, Registry

PROJECT = WandbProject("digits", "me", "parent-run", None)
ROWS = [Measured({"loss": 1 / step, "lr": 0.1, "bad": float("nan")}, step, step) for step in (1, 2, 3)]


class Recorder:
    """The package, as far as a mirror calls it; `fault` is called in the place of each method that it names."""

    def __init__(self, **faults: Any) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.faults = faults
        self.Settings = lambda **values: values
        self.summary = SimpleNamespace(update=lambda values: self._note("summary", values))

    def _note(self, name: str, value: Any) -> None:
        if name in self.faults:
            self.faults[name]()
        self.calls.append((name, value))

    def init(self, **settings: Any) -> "Recorder":
        self._note("init", settings)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._note("log", (step, values))

    def finish(self, exit_code: int) -> None:
        self._note("finish", exit_code)


def fail() -> None:
    raise ConnectionError("W&B is away, key canary-word-of-the-key")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Registry(tmp_path_factory.mktemp("registry") / "store")


def mirrored(registry: Registry, monkeypatch: pytest.MonkeyPatch, package: Recorder) -> tuple[RunRecord, list[str]]:
    """The record of a new run with a mirror, after some metrics and an evaluation; and the warnings."""
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setenv("WANDB_API_KEY", "canary-word-of-the-key")
    warnings: list[str] = []
    run, _ = registry.run()
    evaluation = registry.entry("a", {"fd_classifier": 5.0}, PROTOCOL, run).evaluation
    mirror = WandbMirror(PROJECT, run, "train m", {"lr": 0.1, "source": "https://u:canary@h/x"}, warnings.append)
    record = RunRecord(registry.catalog, run, mirror)
    record.metrics(ROWS[:2])
    record.metrics(ROWS)  # as after a lost answer of MLflow: nothing is sent twice
    record.artifact(evaluation)
    mirror.close()
    history = registry.catalog.client.get_metric_history(run, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(row.step, row.values["loss"]) for row in ROWS]
    return record, warnings


def test_curves_and_final_metrics_arrive_once_beside_mlflow(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Recorder()
    record, warnings = mirrored(registry, monkeypatch, package)
    (_, settings), *logged, (last, summary), (end, code) = package.calls
    assert (settings["project"], settings["entity"], settings["group"]) == ("digits", "me", "parent-run")
    assert (settings["id"], settings["name"], settings["config"]["lr"]) == (record.run_id, "train m", 0.1)
    assert "canary" not in str(settings)
    assert logged == [("log", (row.step, {"loss": row.values["loss"], "lr": 0.1})) for row in ROWS]
    assert (last, summary["metrics.fd_classifier"]) == ("summary", 5.0)
    assert (end, code) == ("finish", 0)
    assert warnings == []


@pytest.mark.parametrize("place", ["init", "log", "summary", "finish"])
def test_a_failure_is_one_warning_and_mlflow_has_everything(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    _, warnings = mirrored(registry, monkeypatch, Recorder(**{place: fail}))
    (warning,) = warnings
    assert warning.startswith("W&B has not all of train m; MLflow has it (ConnectionError: W&B is away")
    assert "canary" not in warning


def test_a_silent_service_holds_nothing_up(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_mirror, "_PATIENCE_S", 0.1)
    released = threading.Event()
    try:
        _, warnings = mirrored(registry, monkeypatch, Recorder(init=lambda: released.wait(600)))
        assert warnings == ["W&B did not take all of train m within 0.1 s; MLflow has it"]
    finally:
        released.set()


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
def test_a_step_closes_its_run_there_with_its_outcome(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    package = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", package)
    warnings: list[str] = []
    run, config = registry.run()
    evaluation = registry.entry(f"fails {fails}", {"fd_classifier": 5.0}, PROTOCOL, run).evaluation

    @contextmanager
    def delivery(board: Any, name: str, record: RunRecord) -> Iterator[None]:
        record.metrics(ROWS)
        yield

    def execute(*_: Any, mlflow_run_id: str) -> Any:
        if fails:
            raise ValueError("the step's own error")
        return evaluation

    monkeypatch.setattr(step, "Delivery", delivery)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.catalog.tracking_uri)
    task = step.StepTask(
        name="evaluate m",
        stage=SimpleNamespace(kind="evaluation", execute=execute),  # type: ignore[arg-type]
        config=config.evaluate,
        fingerprint=evaluation.fingerprint,
        store=SimpleNamespace(writer=lambda *_: None),  # type: ignore[arg-type]
        catalog=registry.catalog,
        parent_run=run,
        board=SimpleNamespace(warn=SimpleNamespace(remote=lambda name, text: warnings.append(text))),
        shared_cluster=False,
        wandb=PROJECT,
    )
    with pytest.raises(ValueError, match="the step's own error") if fails else nullcontext():
        assert step._execute(task, {}) is evaluation
    assert warnings == []
    assert package.calls[0][0] == "init"
    assert [call for call in package.calls if call[0] == "log"][-1] == ("log", (3, {"loss": 1 / 3, "lr": 0.1}))
    assert package.calls[-1] == ("finish", int(fails))
    assert ("summary" in dict(package.calls)) != fails


def test_a_step_without_numbers_has_no_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", package)
    WandbMirror(PROJECT, "run", "report", {}, fail).close()
    assert package.calls == []


def test_a_project_changes_no_record_of_a_run_without_one() -> None:
    plain = load_config("quickstart")
    assert plain.wandb.project is None
    assert "wandb" not in recorded_fields(plain)
    assert "wandb" not in recorded_yaml(plain)
    assert WandbProject.of(plain.wandb.project, None, "run", None) is None
    own = load_config("quickstart", ["wandb.project=digits", "wandb.entity=me"])
    assert WandbProject.of(own.wandb.project, own.wandb.entity, "run", None) == WandbProject(
        "digits", "me", "run", None
    )


@pytest.mark.parametrize("package", [None, SimpleNamespace()], ids=["missing", "a folder of this name"])
def test_without_the_package_a_run_ends_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Any
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", package)
    arguments = ["run", "quickstart", "--store", str(tmp_path / "store"), "--set", "wandb.project=digits"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError), result.output
    assert "wandb.project is 'digits', but the package wandb is not installed" in str(result.exception)
    assert not list((tmp_path / "store").rglob("manifest.json"))
    check_wandb(None)
