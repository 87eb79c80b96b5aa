"""Delivery to a real MLflow server: what is reported while it is away arrives, once and in order, and blocks nobody."""

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import HISTORY_NAME
from jobs.runtime.board import Board, BoardProgress, Measured
from pipelines.engine import delivery
from pipelines.engine.delivery import Delivery, UndeliveredError, is_refused, quick_http, with_patience
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.run_record import RunRecord
from tests.support.processes import wait_for
from tests.support.servers import MlflowServer

pytestmark = [pytest.mark.extern, pytest.mark.usefixtures("here")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at the board, and two tries of a server."""
    monkeypatch.setattr(delivery, "_INTERVAL_S", 0.02)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_S", 0.5)


@pytest.fixture
def catalog(server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalog]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with quick_http():
        yield Catalog.open(Folder.at(tmp_path), tmp_path.name)


@pytest.fixture
def board(here: None) -> Any:
    import ray

    return ray.remote(Board).options(num_cpus=0).remote()


def history(catalog: Catalog, run: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in catalog.client.get_metric_history(run, name)]


def png(level: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.full((8, 12, 3), level, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of every attempt to write metrics, as it ends."""
    outcomes: list[str] = []
    metrics = RunRecord.metrics

    def noted(self: RunRecord, rows: list[Measured]) -> None:
        try:
            metrics(self, rows)
        except Exception:
            outcomes.append("failed")
            raise
        outcomes.append("written")

    monkeypatch.setattr(RunRecord, "metrics", noted)
    return outcomes


@pytest.mark.parametrize("in_vain", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_server_that_is_away_costs_no_metric_and_holds_up_no_report(
    in_vain: int, server: MlflowServer, catalog: Catalog, board: Any, tries: list[str]
) -> None:
    """While nobody answers, reports are made as before: the server is started again after them."""
    run = catalog.start_run("train", {})
    progress, step = BoardProgress("train", board), 0

    def produce() -> None:
        nonlocal step
        for _ in range(20):
            step += 1
            progress.metrics({"loss": 1 / step, "lr": step * 1e-3}, step)

    with Delivery(board, "train", RunRecord(catalog, run)):
        produce()
        wait_for(lambda: len(history(catalog, run, "loss")) == step)
        server.kill()
        try:
            produce()
            wait_for(lambda: tries.count("failed") >= in_vain)
            produce()
            progress.image("samples", png(9), step)
            progress.checkpoints({step: ("uri", "digest")})
            measured, back_ms = step, time.time_ns() // 1_000_000
        finally:
            server.start()
        produce()
    expected = [(k, 1 / k) for k in range(1, step + 1)]
    assert history(catalog, run, "loss") == expected
    assert [k for k, _ in history(catalog, run, "lr")] == [k for k, _ in expected]
    times = [m.timestamp for m in catalog.client.get_metric_history(run, "loss")]
    assert times == sorted(times)
    assert times[measured - 1] <= back_ms  # of measuring, not of delivery
    assert [file.path for file in catalog.client.list_artifacts(run, "images") if file.path.endswith(".png")]
    assert len(models_of(catalog, run)) == 1


def models_of(catalog: Catalog, run: str) -> dict[int, Any]:
    found = catalog.client.search_logged_models([catalog.experiment_id], f"source_run_id = '{run}'")
    steps = [int(model.params["step"]) for model in found]
    assert len(set(steps)) == len(steps)
    return dict(zip(steps, found, strict=True))


def test_the_end_of_a_step_does_not_wait_for_ever(tmp_path: Path, board: Any) -> None:
    catalog = Catalog("http://127.0.0.1:9", "0")
    BoardProgress("train", board).metrics({"loss": 1.0}, 1)
    with (
        quick_http(),
        pytest.raises(UndeliveredError, match=r"127\.0\.0\.1:9 did not accept .* 'train' within 1 s"),
        Delivery(board, "train", RunRecord(catalog, "run"), patience_s=1.0),
    ):
        pass
    with (
        quick_http(),
        pytest.raises(RuntimeError, match="its own"),
        Delivery(board, "train", RunRecord(catalog, "run"), patience_s=1.0),
    ):
        raise RuntimeError("its own")


def test_what_a_restart_measures_again_is_there_once(catalog: Catalog, board: Any) -> None:
    run = catalog.start_run("train", {})
    progress = BoardProgress("train", board)
    with Delivery(board, "train", RunRecord(catalog, run)):
        for step in (1, 2, 3, 2, 3, 4):
            progress.metrics({"loss": 1 / step, "bad": float("nan")}, step)
    with Delivery(board, "train", RunRecord(catalog, run)):  # of another driver
        for step in (3, 4, 5):
            progress.metrics({"loss": 1 / step}, step)
    assert history(catalog, run, "loss") == [(k, 1 / k) for k in range(1, 6)]
    assert history(catalog, run, "bad") == []


def test_more_metrics_than_one_call_takes_arrive(catalog: Catalog) -> None:
    run = catalog.start_run("train", {})
    rows = [Measured({f"m{i}": float(step) for i in range(30)}, step, step) for step in range(1, 101)]
    record = RunRecord(catalog, run)
    record.metrics(rows)
    record.metrics(rows)
    assert history(catalog, run, "m29") == [(step, float(step)) for step in range(1, 101)]


def test_a_repeat_after_an_answer_was_lost_doubles_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    run = catalog.start_run("train", {})
    record, client = RunRecord(catalog, run), catalog.client
    log_batch = client.log_batch

    def answer_lost(*arguments: Any, **named: Any) -> None:
        log_batch(*arguments, **named)
        raise ConnectionError("reset")

    rows = [Measured({"loss": 0.5}, 1, 1_700_000_000_000), Measured({"loss": 0.4}, 2, 1_700_000_001_000)]
    with monkeypatch.context() as patch:
        patch.setattr(client, "log_batch", answer_lost)
        with pytest.raises(ConnectionError):
            record.metrics(rows)
    record.metrics(rows)
    assert history(catalog, run, "loss") == [(1, 0.5), (2, 0.4)]


def test_pictures_arrive_by_step_and_can_be_downloaded(catalog: Catalog, board: Any, tmp_path: Path) -> None:
    from PIL import Image

    run = catalog.start_run("train", {})
    progress = BoardProgress("train", board)
    with Delivery(board, "train", RunRecord(catalog, run)):
        for step in (10, 20):
            progress.image("sample grid/ema", png(step), step)
    with Delivery(board, "train", RunRecord(catalog, run)):  # a restart makes the last one again
        progress.image("sample grid/ema", png(20), 20)
    paths = sorted(file.path for file in catalog.client.list_artifacts(run, "images") if file.path.endswith(".png"))
    assert [path.split("+")[2] for path in paths] == ["10", "20"]
    image = Image.open(catalog.client.download_artifacts(run, paths[1], str(tmp_path)))
    assert (image.size, image.getpixel((0, 0))) == ((12, 8), (20, 20, 20))
    assert catalog.client.get_run(run).data.tags["mlflow.loggedImages"] == "True"


def test_what_is_refused_is_told_and_holds_up_nothing(catalog: Catalog, board: Any) -> None:
    run = catalog.start_run("train", {})
    progress = BoardProgress("train", board)
    with Delivery(board, "train", RunRecord(catalog, run)):
        progress.metrics({"loss": 1.0}, 1)
        progress.metrics({"no[name]": 1.0}, 1)
        progress.image("samples", b"no image", 1)
        progress.metrics({"loss": 0.5}, 2)
    assert history(catalog, run, "loss") == [(1, 1.0), (2, 0.5)]
    warnings = catalog.client.get_run(run).data.tags["edt.warnings"].splitlines()
    assert len(warnings) == 2
    assert "no[name]" in warnings[0]
    assert "samples is not an image" in warnings[1]


def test_warnings_become_a_tag_of_bounded_length(catalog: Catalog, board: Any) -> None:
    run = catalog.start_run("train", {})
    progress = BoardProgress("train", board)
    with Delivery(board, "train", RunRecord(catalog, run)):
        progress.warn("first\nof two lines")
        progress.warn("second")
    assert catalog.client.get_run(run).data.tags["edt.warnings"] == "first of two lines\nsecond"
    with Delivery(board, "train", RunRecord(catalog, run)):
        for number in range(500):
            progress.warn(f"warning number {number}")
    text = catalog.client.get_run(run).data.tags["edt.warnings"]
    assert text.startswith("...\nwarning number ")
    assert text.endswith("warning number 499")
    assert 4000 < len(text) <= 5000


def test_logged_models_are_the_checkpoints_that_there_are(catalog: Catalog, board: Any) -> None:
    run = catalog.start_run("train", {})
    progress = BoardProgress("train", board)
    record = RunRecord(catalog, run)
    with Delivery(board, "train", record):
        progress.metrics({"loss": 0.5}, 10)
        progress.checkpoints({10: ("uri-10", "a")})
        wait_for(lambda: list(models_of(catalog, run)) == [10])
        progress.metrics({"loss": 0.4}, 20)
        progress.checkpoints({10: ("uri-10", "a"), 20: ("uri-20", "b")})
        wait_for(lambda: sorted(models_of(catalog, run)) == [10, 20])
        progress.checkpoints({20: ("uri-20", "b"), 30: ("uri-30", "c")})
        progress.metrics({"loss": 0.3, "lr": 0.1}, 30)
    models = models_of(catalog, run)
    assert sorted(models) == [20, 30]
    assert [model.name for _, model in sorted(models.items())] == ["step-00000020", "step-00000030"]
    assert {str(model.status) for model in models.values()} == {"READY"}
    assert models[30].tags["edt.uri"] == "uri-30"
    assert models[30].tags["edt.digest"] == "c"
    assert {metric.key: metric.value for metric in models[30].metrics} == {"loss": 0.3, "lr": 0.1}
    assert history(catalog, run, "loss") == [(10, 0.5), (20, 0.4), (30, 0.3)]
    before = {model.model_id for model in models.values()}
    RunRecord(catalog, run).checkpoints({20: ("moved", "d"), 30: ("uri-30", "c")})
    models = models_of(catalog, run)
    assert {model.model_id for model in models.values()} == before
    assert models[20].tags["edt.uri"] == "moved"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Artifact:
    """A checkpoint artifact as a training leaves it: history and two kept checkpoints."""
    out = ArtifactWriter(Folder.at(tmp_path / "checkpoint"), "checkpoint", "c" * 64)
    rows = "".join(f'{{"step": {step}, "loss": {1 / step}}}\n' for step in (2, 4, 6, 8))
    out.write_bytes(HISTORY_NAME, rows.encode(), 4)
    return out.commit({}, {}, {"checkpoints": ["step-00000006", "step-00000008"], "steps": 8})


def test_a_recorded_artifact_leaves_no_hole(catalog: Catalog, checkpoint: Artifact, board: Any) -> None:
    run = catalog.start_run("train", {})
    with Delivery(board, "train", RunRecord(catalog, run)):
        progress = BoardProgress("train", board)
        progress.metrics({"loss": 1 / 2}, 2)
        progress.metrics({"loss": 1 / 6}, 6)
        progress.checkpoints({2: ("old", "x"), 6: ("live", "y")})
    for _ in range(2):  # done twice, it is as if done once
        RunRecord(catalog, run).artifact(checkpoint)
        assert sorted(history(catalog, run, "loss")) == [(step, 1 / step) for step in (2, 4, 6, 8)]
        models = models_of(catalog, run)
        assert sorted(models) == [6, 8]
        assert models[6].tags["edt.uri"] == f"{checkpoint.data.uri}/checkpoints/step-00000006"
        assert [metric.value for metric in models[8].metrics] == [1 / 8]


def test_a_recorded_artifact_needs_no_live_report(catalog: Catalog, checkpoint: Artifact) -> None:
    run = catalog.start_run("train", {})
    RunRecord(catalog, run).artifact(checkpoint)
    assert sorted(models_of(catalog, run)) == [6, 8]
    assert len(history(catalog, run, "loss")) == 4


def test_a_step_that_was_lost_goes_on_in_its_run(catalog: Catalog) -> None:
    parents = [catalog.start_run("workflow", {}) for _ in range(3)]
    run = catalog.step_run("train", "checkpoint", "a" * 64, parents[0])
    catalog.log_params(run, {"lr": 0.1, "model": {"dim": 4}})
    catalog.set_tags(run, {"edt.error": "ValueError: no"})
    catalog.end_run(run, "FAILED")
    for restart, parent in enumerate(parents[1:], start=1):  # after a failure, and after a SIGKILL
        assert catalog.step_run("train", "checkpoint", "a" * 64, parent) == run
        catalog.log_params(run, {"lr": 0.2, "new": 1})
        found = catalog.client.get_run(run)
        assert found.info.status == "RUNNING"
        assert found.data.tags["edt.restarts"] == str(restart)
        assert found.data.tags["mlflow.parentRunId"] == parent
        assert "edt.error" not in found.data.tags
        assert found.data.params == {"lr": "0.1", "model.dim": "4", "new": "1"}
    assert catalog.unfinished_runs() == {run}
    catalog.end_run(run, "FINISHED")
    assert catalog.unfinished_runs() == set()
    assert catalog.step_run("train", "checkpoint", "a" * 64, parents[0]) != run
    assert catalog.step_run("train", "checkpoint", "b" * 64, parents[0]) != run


def test_a_refusal_is_not_tried_again_and_a_silence_is() -> None:
    from mlflow.exceptions import MlflowException

    calls = []

    def answers_late() -> str:
        calls.append(1)
        if len(calls) < 2:
            raise MlflowException("API request failed")
        return "done"

    assert with_patience(answers_late) == "done"
    refusal = MlflowException.invalid_parameter_value("no")
    assert is_refused(refusal)
    with pytest.raises(MlflowException, match="no"):
        with_patience(lambda: (_ for _ in ()).throw(refusal))
    with pytest.raises(ConnectionError):
        with_patience(lambda: (_ for _ in ()).throw(ConnectionError()), patience_s=0)
