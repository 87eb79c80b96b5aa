"""Evaluations along the training: kept checkpoints, the curve of their metrics, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edt_core.config import SampleConfig
from edt_core.errors import UserError
from edt_core.evaluation.config import AlongConfig, EvaluateConfig
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import CollectedWarnings, Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import EMA_WEIGHTS
from edt_core.store.store import Store
from jobs.models.open import open_model
from jobs.stages import along, evaluate, sample
from jobs.stages.training import follow
from pipelines.commands.options import catalog_if_any
from pipelines.config.schema import load_config
from pipelines.plan import plan
from pipelines.tracking.catalog import Catalog
from tests.support.small import MODEL, SMALL, STEPS, copy_store, edt, pipeline

if TYPE_CHECKING:
    from pipelines.outcome import Outcome

ON = ("along.every=2", "along.num_samples=24", "along.num_sampling_steps=2", "along.unit_size=16", "along.repeats=2")
FLOW = ("train.objective=flow", "train.timestep_sampler=uniform")
STEPS_MEASURED = [2, 4, 6, 8]


@pytest.fixture(scope="module")
def copied(first: "Outcome", store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("along") / "edt-store"
    copy_store(store, copy)
    return copy


@pytest.fixture(scope="module")
def measured(copied: Path) -> "Outcome":
    """The pipeline run again, with evaluations along the training."""
    from tests.support.local_ray import local_ray_train

    with local_ray_train():
        return pipeline(copied, *ON)


def made(store: Path, kind: str, **config: Any) -> Artifact:
    """The only artifact of a kind whose configuration has these values."""
    (found,) = [
        artifact
        for artifact in Store.open(str(store)).artifacts()
        if artifact.manifest.kind == kind and config.items() <= artifact.manifest.config.items()
    ]
    return found


def inputs_of(store: Path) -> dict[str, Artifact]:
    return {
        "checkpoint": made(store, "checkpoint", keep_every=2),
        "autoencoder": made(store, "autoencoder"),
        "classifier": made(store, "classifier"),
        "reference": made(store, "reference"),
    }


def test_every_kept_checkpoint_is_measured_and_nothing_else_changes(
    measured: "Outcome", copied: Path, store: Path
) -> None:
    assert measured.failures == {}
    training, before = made(copied, "checkpoint", keep_every=2), made(store, "checkpoint", max_steps=8)
    assert [int(name[-8:]) for name in training.counts["checkpoints"]] == STEPS_MEASURED
    assert [int(name[-8:]) for name in before.counts["checkpoints"]] == [4, 8]
    weights = [load_tensors(a.path(f"{a.counts['final']}/{EMA_WEIGHTS}"), "numpy") for a in (training, before)]
    assert all((weights[0][name] == value).all() for name, value in weights[1].items())
    curve = made(copied, "along")
    assert (curve.counts["steps"], curve.counts["samples"]) == (STEPS_MEASURED, 4 * 2 * 24)
    assert [entry.path for entry in curve.manifest.files] == ["along.json"]


def test_a_point_is_what_sample_and_evaluate_say_of_that_checkpoint(
    measured: "Outcome", copied: Path, tmp_path: Path, here: None
) -> None:
    """The checkpoint of step 6 as an artifact of its own, as `edt evaluate` opens its folder."""
    points, inputs = made(copied, "along").read_json("along.json"), inputs_of(copied)
    folder = inputs["checkpoint"].data.child("checkpoints/step-00000006").uri
    inputs["checkpoint"] = open_model(folder, Folder.at(tmp_path / "work")).checkpoint
    config = SampleConfig(num_samples=24, num_sampling_steps=2, unit_size=16, repeats=2, cfg_scale=1)
    reference = inputs.pop("reference")
    out = ArtifactWriter(Folder.at(tmp_path / "features"), "features", "f" * 64)
    features = sample.STAGE.execute(config, inputs, out, Silent())
    assert features.counts["checkpoint_steps"] == 6
    out = ArtifactWriter(Folder.at(tmp_path / "evaluation"), "evaluation", "e" * 64)
    compared = {"features": features, "reference": reference}
    evaluation = evaluate.STAGE.execute(EvaluateConfig(allow_rank_deficient=True), compared, out, Silent())
    (point,) = [point for point in points["points"] if point["step"] == 6]
    assert {name: value for name, value in point.items() if name != "step"} == pytest.approx(
        evaluation.counts["metrics"]
    )
    assert points["protocol"] == evaluation.counts["protocol"]
    assert len({point["fd_classifier"] for point in points["points"]}) == 4


def test_the_curve_is_in_mlflow_and_in_the_report(measured: "Outcome", copied: Path) -> None:
    curve = made(copied, "along")
    client = Catalog(measured.tracking_uri, "").client
    history = client.get_metric_history(str(curve.manifest.mlflow_run_id), "fd_classifier")
    points = curve.read_json("along.json")["points"]
    assert {row.step: row.value for row in history} == {
        int(point["step"]): pytest.approx(point["fd_classifier"]) for point in points
    }
    page = measured.reports[MODEL].path("report.html").read_text()
    assert "fd_classifier of 24 samples of 2 steps from each kept checkpoint" in page
    assert f"along {MODEL}".removesuffix(f" {MODEL}") in page


def test_a_second_run_reuses_the_curve(measured: "Outcome", copied: Path) -> None:
    planned = plan(load_config("quickstart", [*SMALL, *ON], str(copied)), catalog_if_any(str(copied)))
    assert {step.action for step in planned} == {"reuse"}
    assert len(planned) == STEPS + 2  # the curve, and the promotion
    garbage = json.loads(edt("gc", "--dry-run", "--json", "--store", str(copied)).stdout)["garbage"]
    assert made(copied, "along").fingerprint not in {item["fingerprint"] for item in garbage}


def test_a_training_with_patience_is_found_again_and_its_lineage_names_what_ended_it(
    measured: "Outcome", copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.local_ray import local_ray_train

    copy, patient = tmp_path / "edt-store", (*ON, "train.patience=2")
    copy_store(copied, copy)
    monkeypatch.setattr(follow, "ran_out", lambda values, patience, lower_is_better: 4 if 4 in values else None)
    with local_ray_train():
        outcome = pipeline(copy, *patient)
    assert outcome.failures == {}
    training = made(copy, "checkpoint", patience=2)
    assert training.counts["patience"] == {"metric": "fd_classifier", "evaluations": 2, "of": 8}
    assert training.counts["steps"] == 4
    curves = [item for item in Store.open(str(copy)).artifacts() if item.manifest.kind == "along"]
    assert sorted(curve.counts["steps"] for curve in curves) == [[2, 4], STEPS_MEASURED]
    planned = plan(load_config("quickstart", [*SMALL, *patient], str(copy)), catalog_if_any(str(copy)))
    assert {step.action for step in planned} == {"reuse"}
    lines = edt("lineage", training.fingerprint, "--store", str(copy)).stdout
    assert "until (evaluations along it)" in lines
    page = outcome.reports[MODEL].path("report.html").read_text()
    assert "The training ended here, of 8 steps: fd_classifier was not better in 2 evaluations" in page


def test_a_killed_curve_resumes_after_its_finished_units(
    measured: "Outcome", copied: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AlongConfig(every=4, num_samples=24, num_sampling_steps=2, unit_size=8, cfg_scale=1)
    drawn: list[int] = []
    draw = sample.Sampler._draw

    def dies(self: sample.Sampler, unit: sample.Unit) -> Any:
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(unit.indices[0])
        return draw(self, unit)

    monkeypatch.setattr(sample.Sampler, "_draw", dies)
    out = ArtifactWriter(Folder.at(tmp_path / "killed"), "along", "a" * 64, "first")
    with pytest.raises(KeyboardInterrupt):
        along.STAGE.execute(config, inputs_of(copied), out, Silent())
    monkeypatch.setattr(sample.Sampler, "_draw", lambda self, unit: drawn.append(unit.indices[0]) or draw(self, unit))
    again = replace(out, attempt="second", previous=("first",))
    resumed = along.STAGE.execute(config, inputs_of(copied), again, Silent())
    assert len(drawn) == 6  # two checkpoints of three units
    whole = ArtifactWriter(Folder.at(tmp_path / "whole"), "along", "a" * 64)
    assert along.STAGE.execute(config, inputs_of(copied), whole, Silent()).manifest.digest == resumed.manifest.digest


def test_what_cannot_be_measured_is_refused(measured: "Outcome", copied: Path) -> None:
    refused = {
        ("along.every=3", "train.keep_every=2"): "along.every 3 is no multiple of train.keep_every 2",
        ("along.every=2", "train.trainable=bias", "train.init_from=x@y"): "trains only some parameters",
        ("along.every=2", "along.num_sampling_steps=2000"): "along.num_sampling_steps 2000 is more than the 1000",
        ("along.every=2", "along.guidance_channels=9"): "along.guidance_channels 9 is more than the 4 latent",
        ("along.every=2", "along.sampler=heun"): "heun",
        ("train.patience=2",): "train.patience is 2 .* nothing is evaluated along its training",
        ("along.every=2", "train.patience=2", "train.ema_widths=[0.1]"): r"patience is 2.* ema_widths \[0.1\]",
        ("along.every=2", "along.amm_blocks=[99]"): r"amm_blocks \[99\] do not exist",
        ("along.every=2", "along.metrics=[kid]"): "along.metrics measures kid_classifier",
        (*FLOW, "sample.guidance_interval=[200, 800]"): "begins after the last timestep",
    }
    for assignments, text in refused.items():
        with pytest.raises(UserError, match=text):
            load_config("quickstart", [*SMALL, *assignments], str(copied))
    inputs = inputs_of(copied)
    warnings = CollectedWarnings()
    assert along.check(AlongConfig(every=3, num_sampling_steps=2), inputs, warnings) == [6, 8]
    (warning,) = warnings.warnings
    assert "did not keep 1 of the checkpoints at multiples of 3 steps (the first is that of step 3)" in warning
    with pytest.raises(UserError, match=r"did not keep 1 of the .* multiples of 5 steps .* train.keep_every=5"):
        along.check(AlongConfig(every=5), inputs, Silent())
    with pytest.raises(UserError, match=r"along.every is null"):
        along.check(AlongConfig(), inputs, Silent())


def test_without_it_a_configuration_means_what_it_meant() -> None:
    config = load_config("quickstart", SMALL)
    assert config.train_of(MODEL).keep_every is None
    assert load_config("quickstart", [*SMALL, "along.every=4"]).train_of(MODEL).keep_every == 4
    flow = load_config("quickstart", [*SMALL, "along.every=4", *FLOW])
    assert (flow.sample.sampler, flow.along.sampler) == ("euler", "euler")
