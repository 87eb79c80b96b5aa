"""The whole pipeline on real digits, smaller than the quickstart only in its numbers: run, run again, change, fail."""

import json
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from edt_core.config import AutoencoderConfig
from edt_core.diffusion import Schedule, linear_schedule
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.store import Store
from jobs.stages import autoencoder
from pipelines.engine.workflow import Workflow
from pipelines.notification import of_outcome
from pipelines.outcome import Outcome
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog
from tests.support.runs import artifacts_of
from tests.support.small import CANARY, MODEL, STEPS, copy_store, edt, options, pipeline

pytestmark = pytest.mark.usefixtures("training_here")


def test_the_first_run_makes_every_artifact(first: Outcome, store: Path) -> None:
    assert (first.executed, first.reused, first.failures) == (STEPS, 0, {})
    kinds = sorted(artifact.manifest.kind for artifact in artifacts_of(first, store))
    assert kinds == sorted(
        ["images", "autoencoder", "latents", "classifier", "reference", "report"]
        + 2 * ["checkpoint", "features", "evaluation"]
    )
    for artifact in Store.open(str(store)).artifacts():
        assert artifact.problems(deep=True) == []


def test_what_was_made_is_told_with_metrics_before_and_after(first: Outcome) -> None:
    before, after = first.metrics[MODEL]
    names = {f"{name}_classifier" for name in ("fd", "kid", "precision", "recall", "accuracy")}
    assert set(before) == set(after) == names
    assert not any(name in after for name in ("fid", "kid"))
    assert first.decisions[MODEL].became_champion


def test_the_report_is_one_page_that_asks_for_nothing(first: Outcome) -> None:
    page = first.reports[MODEL].path("report.html").read_text()
    for needed in (MODEL, "fd_classifier", "untrained", "data:image/"):
        assert needed in page
    for outside in ('src="http', "src='http", 'href="http', "url(http", "<script"):
        assert outside not in page
    assert first.reports[MODEL].path("samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_reuses_every_artifact(first: Outcome, store: Path) -> None:
    second = pipeline(store)
    assert (second.executed, second.reused) == (0, STEPS)
    assert second.decisions == first.decisions
    assert second.reports[MODEL].manifest == first.reports[MODEL].manifest


def test_a_registered_model_is_sampled_to_the_same_bytes(
    first: Outcome, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By its name in the registry and by the run of its training, as the pipeline sampled it."""
    from jobs.commands import evaluate_model as evaluation

    artifacts = list(Store.open(str(store)).artifacts())
    of_kind = {artifact.manifest.kind: artifact for artifact in artifacts}
    (trained,) = (a for a in artifacts if a.manifest.kind == "checkpoint" and a.counts["steps"])
    sampled = (a for a in artifacts if a.manifest.kind == "features")
    (features,) = (a for a in sampled if a.manifest.inputs["checkpoint"] == trained.fingerprint)
    given = ("num_samples", "num_sampling_steps", "unit_size", "cfg_scale")
    fields = [f"--{name.replace('_', '-')}={features.manifest.config[name]}" for name in given]
    judge = of_kind["classifier"].folder.uri
    for model, source in ((f"{MODEL}@champion", ["--images", of_kind["images"].folder.uri]), (run_of(trained), [])):
        out = tmp_path / str(len(source))
        more = ["--tracking-uri", first.tracking_uri, "--classifier", judge]
        evaluation.main([model, str(out), *source, *more, *fields])
        (made,) = (out / "features").iterdir()
        assert Artifact.open(made).manifest.digest == features.manifest.digest
        (result,) = json.loads((out / "results.json").read_text())
        assert result["metrics"] == first.metrics[MODEL][1]
        assert "All measured by one protocol" in capfd.readouterr().out


def test_weights_that_mlflow_keeps_are_found(first: Outcome, tmp_path: Path) -> None:
    import hashlib

    from mlflow import MlflowClient

    from jobs.stages.extractors import extractor_source

    weights = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    weights.write_bytes(b"weights")
    MlflowClient(first.tracking_uri).log_artifact(first.run_id, str(weights), "inception")
    location = f"runs:/{first.run_id}/inception"
    found = extractor_source("inception", location, tracking_uri=first.tracking_uri)
    assert found.fingerprint == hashlib.sha256(b"weights").hexdigest()
    assert Path(found.location).read_bytes() == b"weights"
    with pytest.raises(UserError, match="MLflow has no weights at runs:/"):
        extractor_source("inception", f"runs:/{first.run_id}/nothing", tracking_uri=first.tracking_uri)


def run_of(artifact: Artifact) -> str:
    return f"runs:/{artifact.manifest.mlflow_run_id}"


def test_a_second_run_from_the_command_line_says_so(first: Outcome, store: Path) -> None:
    done = edt("run", "--store", str(store), *options())
    told = done.stdout
    assert done.returncode == 0, told + done.stderr
    assert told.count("  reused  ") == STEPS
    assert f"{STEPS} steps reused, 0 run" in told
    for path in (first.reports[MODEL].path("report.html"), first.reports[MODEL].path("samples.png")):
        assert str(path) in told
    assert f"edt ui --store {store} --run " in told


def test_a_run_tells_programs_how_it_ended(first: Outcome, store: Path) -> None:
    done = edt("run", "--json", "--store", str(store), *options())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["status"], told["reused"], told["executed"], told["failures"]) == ("finished", STEPS, 0, {})
    (model,) = told["models"].values()
    assert model["metrics"] == first.metrics[MODEL][1]
    assert Path(model["report"]).is_file()
    assert "  reused    preprocess" in Path(told["log"]).read_text()
    assert "  reused    preprocess" in done.stderr


def test_a_changed_field_runs_what_hangs_on_it_and_no_more(resampled: Outcome) -> None:
    assert (resampled.executed, resampled.reused) == (5, 9)  # sample and evaluate, twice, and the report
    assert resampled.decisions[MODEL].version == "2"
    assert resampled.decisions[MODEL].champion_before == "1"


def test_fields_that_do_not_change_the_result_change_nothing(first: Outcome, store: Path) -> None:
    other = pipeline(store, "sample.num_workers=2", "encode.batch_size=7", "train.checkpoint_every=3")
    assert other.executed <= 1  # the report prints the configuration


def test_mlflow_holds_runs_tags_models_and_lineage(first: Outcome) -> None:
    catalog = Catalog(first.tracking_uri, _experiment(first))
    parent = catalog.client.get_run(first.run_id)
    assert parent.info.status == "FINISHED"
    children = catalog.client.search_runs(
        [catalog.experiment_id], f"tags.mlflow.parentRunId = '{first.run_id}'", max_results=100
    )
    assert len(children) == STEPS
    by_step = {run.data.tags["edt.step"]: run for run in children}
    for child in children:
        assert {"edt.kind", "edt.fingerprint", "edt.uri", "edt.digest", "edt.code_version"} <= set(child.data.tags)
        manifest = Artifact.open(child.data.tags["edt.uri"]).manifest
        assert manifest.mlflow_run_id == child.info.run_id
        assert manifest.digest == child.data.tags["edt.digest"]
    trained = by_step[f"train {MODEL}"]
    assert [item.dataset.name.split("-")[0] for item in trained.inputs.dataset_inputs] == ["latents"]
    steps = [metric.step for metric in catalog.client.get_metric_history(trained.info.run_id, "loss")]
    assert sorted(set(steps)) == [4, 8]
    models = catalog.client.search_logged_models([catalog.experiment_id])
    checkpoints = [model for model in models if model.source_run_id == trained.info.run_id]
    assert sorted(model.params["step"] for model in checkpoints) == ["4", "8"]
    assert all(model.metrics for model in checkpoints)


def _experiment(outcome: Outcome) -> str:
    from mlflow import MlflowClient

    return str(MlflowClient(outcome.tracking_uri).get_run(outcome.run_id).info.experiment_id)


def test_the_registered_version_loads_with_pyfunc_and_diffusers(first: Outcome, tmp_path: Path) -> None:
    import mlflow

    from edt_core.pipeline import EDTPipeline

    mlflow.set_tracking_uri(first.tracking_uri)
    catalog = Catalog(first.tracking_uri, _experiment(first))
    version = catalog.client.get_model_version(MODEL, "1")
    assert {"edt.checkpoint", "edt.evaluation", "edt.metric.fd_classifier", "edt.digest"} <= set(version.tags)
    assert catalog.client.get_model_version_by_alias(MODEL, "candidate").version
    images = mlflow.pyfunc.load_model(f"models:/{MODEL}/1").predict(np.array([3, 1, 4]))
    loaded = mlflow.pyfunc.load_model(f"models:/{MODEL}/1")
    assert np.array_equal(loaded.predict(np.array([3, 1, 4])), images)
    assert not np.array_equal(loaded.predict(np.array([3, 1, 4]), params={"seed": 1}), images)
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == np.uint8
    pulled = mlflow.artifacts.download_artifacts(f"models:/{MODEL}/1", dst_path=str(tmp_path))
    own = EDTPipeline.from_pretrained(next(Path(pulled).rglob("model_index.json")).parent)
    assert np.array_equal(np.stack(own([3, 1, 4]).images), images)


def test_another_protocol_makes_a_candidate_and_no_champion(first: Outcome, resampled: Outcome) -> None:
    latest = resampled.decisions[MODEL]
    client = Catalog(first.tracking_uri, "").client
    assert not latest.became_champion
    assert latest.remeasured is not None  # of the same weights, so the values are the same
    assert latest.champion_value == latest.value
    assert "(measured again by the new protocol), the same" in str(latest)
    aliases = {name: client.get_model_version_by_alias(MODEL, name) for name in ("candidate", "champion")}
    assert {name: str(found.version) for name, found in aliases.items()} == {"candidate": "2", "champion": "1"}
    assert latest.version == "2"


def test_a_model_hardly_better_than_random_weights_is_no_first_champion(
    first: Outcome, store: Path, tmp_path: Path
) -> None:
    """The artifacts of the finished run under another name, whose gate requires half of the untrained model's value."""
    copy_store(store, tmp_path / "store")
    shy = pipeline(tmp_path / "store", "models={shy: {}}", "promote.margin=0.5")
    assert shy.failures == {}
    decision, (before, after) = shy.decisions["shy"], shy.metrics["shy"]
    assert before is not None
    assert (decision.value, decision.untrained_value) == (after["fd_classifier"], before["fd_classifier"])
    assert not decision.became_champion
    sentence = str(decision)
    assert f"the untrained model has {before['fd_classifier']:.4g}, better by" in sentence
    assert "promote.margin 0.5 of the untrained model's value" in sentence
    assert "train longer (train.max_steps), or promote it by hand: `edt models promote shy/1 --force`" in sentence
    client = Catalog(shy.tracking_uri, "").client
    assert list(client.get_registered_model("shy").aliases) == ["candidate"]
    page = unescape(shy.reports["shy"].path("report.html").read_text())
    assert sentence.removeprefix("candidate only: ") in page
    (notification,) = of_outcome("quickstart", shy)
    assert (notification.event, notification.message) == ("refused", f"shy version 1: {sentence}")
    # The finished run's gate has no margin: there the same values made a champion.
    assert first.decisions[MODEL].untrained_value == decision.untrained_value
    assert first.decisions[MODEL].became_champion


def test_a_registered_model_gives_its_autoencoder_to_edt_encode(
    first: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", first.tracking_uri)
    mlflow.set_tracking_uri(first.tracking_uri)
    made = autoencoder.published_artifact(f"models:/{MODEL}@champion", Folder.at(tmp_path / "vae"))
    assert made.counts["source"] == f"models:/{MODEL}/1"
    assert made.counts["downsample_factor"] == 4
    assert made.problems(deep=True) == []


def test_a_registered_model_gives_its_autoencoder_to_a_workflow(first: Outcome, store: Path) -> None:
    config = AutoencoderConfig(pretrained=f"models:/{MODEL}@champion", downsample_factor=4)
    catalog = Catalog(first.tracking_uri, _experiment(first))
    workflow = Workflow(Store.open(str(store)), catalog, first.run_id, Terminal(), connect=lambda: False)
    published = autoencoder.published_source(config, first.tracking_uri)
    assert published is not None
    assert published.fingerprint == f"models:/{MODEL}/1"  # the alias may move, the version does not
    future = workflow.step("autoencoder", autoencoder.STAGE, config.published(), published=published)
    assert workflow.wait(future), workflow.failures
    fitted = next(a for a in Store.open(str(store)).artifacts() if a.counts.get("source") == "fitted")
    assert future.result().counts["scaling_factor"] == fitted.counts["scaling_factor"]
    unknown = AutoencoderConfig(pretrained="models:/no-such-model@champion")
    with pytest.raises(UserError, match="MLflow has no autoencoder at models:/no-such-model@champion"):
        autoencoder.published_source(unknown, first.tracking_uri)


def test_a_damaged_artifact_is_made_again_with_the_same_content(first: Outcome, store: Path) -> None:
    artifact = next(a for a in Store.open(str(store)).artifacts() if a.manifest.kind == "reference")
    (artifact.folder.local / MANIFEST_NAME).write_text("{")
    again = pipeline(store)
    assert (again.executed, again.reused) == (1, STEPS - 1)
    assert Artifact.open(artifact.folder).manifest.digest == artifact.manifest.digest


def test_one_failed_branch_leaves_the_others_alone(
    first: Outcome, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the others is reused, and one has work to do: a model of no steps, which need no trainer."""

    def check(num_timesteps: int) -> Schedule:
        if num_timesteps == 30:
            raise UserError("num_timesteps is 30")
        return linear_schedule(num_timesteps)

    # What training checks before it starts workers.
    monkeypatch.setattr("edt_core.diffusion.objective.linear_schedule", check)
    outcome = pipeline(store, "models.broken.num_timesteps=30", "models.fresh={max_steps: 0}")
    assert set(outcome.failures) == {"train broken", "untrained train broken"}
    assert "num_timesteps is 30" in str(outcome.failures["train broken"])
    assert outcome.reports.keys() == outcome.decisions.keys() == {MODEL, "fresh"}
    assert {"train fresh", "sample fresh", "evaluate fresh"} <= executed(outcome)


def executed(outcome: Outcome) -> set[str]:
    """The steps that a run made itself, as its record has them."""
    tags = Catalog(outcome.tracking_uri, "").client.get_run(outcome.run_id).data.tags
    return set(tags["edt.executed"].split(", "))


def test_a_secret_in_the_environment_is_recorded_nowhere(first: Outcome, store: Path) -> None:
    files = [path for path in store.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_manifests_are_plain_json(first: Outcome, store: Path) -> None:
    for artifact in Store.open(str(store)).artifacts():
        values = json.loads((artifact.folder.local / MANIFEST_NAME).read_text())
        assert {"kind", "fingerprint", "inputs", "files", "config", "counts", "code_version"} <= set(values)
