"""Held-out images in a pipeline: planned fingerprints, the run's record in MLflow, and its report."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edt_core.config import Section
from edt_core.store.artifact import Artifact, Source
from edt_core.store.layout import HISTORY_NAME
from jobs.stages.stage import Stage
from pipelines.config.schema import load_config
from pipelines.config.size_check import size_problems
from pipelines.engine.step import StepFuture, input_fingerprints
from pipelines.outcome import Outcome
from pipelines.pipeline import call_steps
from pipelines.report import worth
from pipelines.report.figures import training_curves
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import step_tag
from tests.pipelines.test_report_figures import svg
from tests.support.reports import report_data
from tests.support.small import MODEL, copy_store, pipeline


class _Steps:
    """Keeps the fingerprint and the inputs of each training."""

    def __init__(self) -> None:
        self.trainings: dict[str, tuple[str, set[str]]] = {}

    def step(self, name: str, stage: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        identity = stage.fingerprint(config, input_fingerprints(inputs))
        if stage.name == "train":
            self.trainings[name.removesuffix(f" {MODEL}")] = identity, set(inputs)
        return StepFuture(name, stage.kind, identity)


def trainings(images: int | None, *assignments: str) -> dict[str, tuple[str, set[str]]]:
    steps = _Steps()
    call_steps(steps, load_config("quickstart", assignments), Source("/data", "s", images=images))  # type: ignore[arg-type]
    return steps.trainings


def test_the_default_holds_out_images_of_a_large_set_alone() -> None:
    few, many = trainings(9_999), trainings(10_000)
    assert few == trainings(None) == trainings(9_999, "train.holdout=0") == trainings(10_000, "train.holdout=0")
    assert few["train"][0] != many["train"][0] == trainings(400, "train.holdout=0.01")["train"][0]
    assert few["untrained train"] == many["untrained train"]  # nothing is trained
    assert ("images" in few["train"][1], "images" in many["train"][1]) == (False, True)


def test_a_holdout_that_leaves_too_little_is_a_problem_before_the_run() -> None:
    small = load_config("quickstart", ["train.holdout=0.5", "source.limit=400", "train.global_batch_size=256"])
    (problem,) = size_problems(small, 400)
    assert problem.startswith(f"{MODEL}: train.holdout is 0.5: of 400 images it leaves 200")
    assert size_problems(small, 600) == []
    (problem,) = size_problems(load_config("quickstart", ["train.holdout=0.1"]), 100)
    assert "more than half of the 100" in problem


# --- the report


def rows(*losses: float) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for number, loss in enumerate(losses, start=1):
        found += [
            {"step": 10.0 * number - 5, "loss": 1.0 / number, "loss_full": 0.5 / number},
            {"step": 10.0 * number, "holdout_loss": loss, "holdout_loss_t0": loss},
        ]
    return found


def test_the_picture_of_the_loss_shows_both() -> None:
    losses, *_ = training_curves(rows(0.5, 0.4, 0.3))
    assert "held-out loss (averaged weights) from 0.5 at step 10 to 0.3 at step 30" in losses.description
    assert "total loss from 1 at step 5 to 0.333 at step 25" in losses.description
    without, *_ = training_curves([row for row in rows(0.5, 0.4, 0.3) if "loss" in row])
    assert "held-out" not in without.description
    alone, *_ = training_curves([row for row in rows(0.5) if "loss" not in row])
    assert "held-out" in alone.description


def test_a_curve_is_not_broken_by_rows_without_its_value() -> None:
    """A line of 3 points is one path, though rows of another kind come between."""
    losses, *_ = training_curves(rows(0.5, 0.4, 0.3))
    lines = [line for line in svg(losses).split("<path") if "clip-path" in line and "stroke-width: 1.6" in line]
    assert len(lines) == 3
    assert all(line.count("\nL ") == 2 for line in lines)


def test_the_page_says_what_the_curve_is() -> None:
    from pipelines.report.page import render_report

    text = "The held-out loss is the mean squared error of the prediction on images that were not trained on"
    assert text in render_report(report_data(history=rows(0.5, 0.4)))
    assert text not in render_report(report_data(history=[row for row in rows(0.5, 0.4) if "loss" in row]))


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ((0.5, 0.3, 0.31, 0.32, 0.33), "lowest at step 20 and has risen by 10 % since: the model is overfitting"),
        ((0.5, 0.4, 0.3, 0.29), ""),
    ],
)
def test_overfitting_is_a_doubt_of_the_report(
    losses: tuple[float, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth, "history", lambda checkpoint: rows(*losses))
    found = worth._of_overfitting(SimpleNamespace(counts={"holdout": {}}))  # type: ignore[arg-type]
    assert [remark.doubt for remark in found] == ([True] if says else [])
    assert all(says in remark.text for remark in found)
    assert worth._of_overfitting(SimpleNamespace(counts={})) == ()  # type: ignore[arg-type]


# --- a whole run


@pytest.fixture(scope="module")
def run(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """The small pipeline again with held-out images, on what it made before."""
    from tests.support.local_ray import local_ray_train

    copy = tmp_path_factory.mktemp("holdout") / "edt-store"
    copy_store(store, copy)
    with local_ray_train(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return pipeline(copy, "train.holdout=0.25", "train.validate_every=2", "train.max_steps=8"), copy


def _training(run: tuple[Outcome, Path]) -> Artifact:
    outcome, store = run
    tags = Catalog(outcome.tracking_uri, "").client.get_run(outcome.run_id).data.tags
    return Artifact.open(str(store / "checkpoint" / tags[step_tag(f"train {MODEL}")]))


def test_a_run_trains_again_and_nothing_before_it(run: tuple[Outcome, Path], first: Outcome) -> None:
    outcome, _ = run
    assert outcome.failures == {}
    tags = Catalog(outcome.tracking_uri, "").client.get_run(outcome.run_id).data.tags
    executed = set(tags["edt.executed"].split(", "))
    assert f"train {MODEL}" in executed
    assert not executed & {"preprocess", "encode", "classifier", "reference", f"untrained train {MODEL}"}


def test_its_curve_is_in_mlflow_and_its_report(run: tuple[Outcome, Path]) -> None:
    outcome, store = run
    artifact = _training(run)
    client: Any = Catalog(outcome.tracking_uri, "").client
    metrics = client.get_metric_history(artifact.manifest.mlflow_run_id, "holdout_loss")
    assert [metric.step for metric in metrics] == [2, 4, 6, 8]
    assert metrics[-1].value == artifact.counts["holdout"]["loss"]
    assert "holdout_loss" in artifact.path(HISTORY_NAME).read_text()
    counts = artifact.counts["holdout"]
    assert counts["images"] + counts["training_images"] == 400
    assert client.get_run(artifact.manifest.mlflow_run_id).data.metrics["holdout.images"] == counts["images"]
    (report,) = [path for path in store.glob("report/*/*/report.html") if "held-out loss" in path.read_text()]
    assert f"<dt>images_<wbr>held_<wbr>out</dt><dd>{counts['images']}</dd>" in report.read_text()
