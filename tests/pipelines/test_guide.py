"""`sample.guide`: a pipeline whose samples are guided away from a weaker model, which its version carries."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edt_core.config import SampleConfig
from edt_core.errors import UserError
from edt_core.sampling.sampler import LatentSampler
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from jobs.models.open import load_model, use_mlflow
from jobs.stages.sample import load_units
from pipelines.commands.options import catalog_if_any
from pipelines.config.schema import as_yaml, load_config
from pipelines.diff import outline
from pipelines.outcome import Outcome
from pipelines.pipeline import call_steps, prepare_source
from pipelines.plan import PlannedStep, Planner, plan
from pipelines.registry.garbage import registered_roots, roots
from pipelines.registry.lineage import lineage
from pipelines.reproduce import restored
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record
from tests.support.local_ray import local_ray_train
from tests.support.runs import artifact_of
from tests.support.small import MODEL, SMALL, copy_store, edt, pipeline

EARLIER = ("sample.guide=step-00000004", "train.keep_every=4")


# --- what a configuration says


def test_without_a_guide_no_step_changes() -> None:
    plain = load_config("quickstart")
    assert "guide" not in outline(plain)
    guided = outline(load_config("quickstart", EARLIER))
    assert set(guided) - set(outline(plain)) == {f"guide {MODEL}"}
    kept = outline(load_config("quickstart", ["train.keep_every=4"]))
    differing = {name for name in kept if kept[name] != guided[name]}
    after = {f"{step} {MODEL}" for step in ("sample", "evaluate", "untrained sample", "untrained evaluate")}
    assert differing == {*after, f"promote {MODEL}"}  # the training is the same, and a report is not outlined
    other = outline(load_config("quickstart", ["sample.guide=./weaker"]))
    assert "guide" in other


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["sample.guide=./weaker", "sample.cfg_scale=1"], "sample.cfg_scale is 1, which is no guidance"),
        (["sample.guide=step-00000004"], "keeps no earlier checkpoint (train.keep_every)"),
        (["sample.guide=step-00000006", "train.keep_every=4"], "keeps those of every 4 steps"),
        (["sample.guide=step-00000008", "train.keep_every=4", "train.max_steps=8"], "trains 8 steps"),
        (
            [*EARLIER, "train.init_from=x", "train.trainable=bias", "train.optimizer=adan"],
            "trains only some parameters",
        ),
    ],
)
def test_guides_that_cannot_be_are_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config("quickstart", assignments)
    assert message in str(refused.value)


# --- what a run makes


@pytest.fixture(scope="module")
def place(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished store of the session, to write to."""
    folder = tmp_path_factory.mktemp("guide") / "edt-store"
    copy_store(store, folder)
    return folder


@pytest.fixture(scope="module")
def guided(place: Path) -> Outcome:
    """A run whose samples are guided away from the checkpoint of half its steps."""
    with local_ray_train(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        outcome = pipeline(place, *EARLIER)
    assert not outcome.failures
    return outcome


def test_the_samples_are_those_away_from_the_earlier_checkpoint(guided: Outcome, place: Path) -> None:
    from edt_core.autoencoders.autoencoder import decode_to_pixels
    from edt_core.training.checkpoint import ema_model
    from jobs.stages.sample import averaged_model

    features, weaker = artifact_of(place, guided, "sample", "features"), artifact_of(place, guided, "guide", "guide")
    trained = artifact_of(place, guided, "train", "checkpoint")
    assert features.manifest.inputs["guide"] == weaker.fingerprint
    assert features.counts["guide_digest"] == weaker.manifest.digest
    evaluation = artifact_of(place, guided, "evaluate", "evaluation")
    assert evaluation.counts["protocol"]["guide"] == weaker.manifest.digest
    earlier = ema_model(trained.directory("checkpoints/step-00000004"))
    assert torch.equal(*(next(m.parameters()) for m in (earlier, averaged_model(weaker, "cpu"))))

    version = guided.decisions[MODEL].version
    use_mlflow(f"{MODEL}/{version}", guided.tracking_uri, str(place))
    loaded = load_model(f"{MODEL}/{version}")
    assert loaded.guide is not None
    config, units = SampleConfig.model_validate(features.manifest.config), load_units(features)
    first = slice(0, config.unit_size)
    sampler = LatentSampler(loaded.model, config, loaded.num_timesteps, loaded.guide_of(config))
    latents = sampler(units["labels"][first], config.seed, units["indices"][first])
    pixels = decode_to_pixels(loaded.autoencoder, latents, loaded.model.config)
    assert np.array_equal(pixels, units["images"][first])  # the registered folder draws the pipeline's own images
    unguided = LatentSampler(loaded.model, config, loaded.num_timesteps)
    assert not torch.equal(unguided(units["labels"][first], config.seed, units["indices"][first]), latents)


def test_pyfunc_draws_the_same_picture(guided: Outcome, place: Path) -> None:
    import mlflow

    from edt_core.pipeline import EDTPipeline
    from tests.support.pipelines import quiet

    mlflow.set_tracking_uri(guided.tracking_uri)
    model = mlflow.pyfunc.load_model(f"models:/{MODEL}/{guided.decisions[MODEL].version}")
    labels = np.array([3, 1])
    pixels = model.predict(labels, params={"seed": 5})
    folder = model.unwrap_python_model().pipeline.config._name_or_path
    images = quiet(EDTPipeline.from_pretrained(folder))(labels, seed=5).images
    assert np.array_equal(pixels, np.stack(images))


def test_the_registry_the_lineage_and_gc_name_the_guide(guided: Outcome, place: Path) -> None:
    catalog = Catalog(guided.tracking_uri, "")
    weaker, trained = artifact_of(place, guided, "guide", "guide"), artifact_of(place, guided, "train", "checkpoint")
    version = catalog.client.get_model_version(MODEL, guided.decisions[MODEL].version)
    assert version.tags["edt.guide"] == weaker.fingerprint
    assert any(weaker.fingerprint in found for found in registered_roots(catalog))
    nodes = lineage(catalog, f"{MODEL}/{version.version}", Folder.at(place)).nodes
    assert nodes[weaker.fingerprint].kind == "guide"
    assert nodes[weaker.fingerprint].inputs == {"checkpoint": trained.fingerprint}


def planned(place: Path, *assignments: str) -> dict[str, PlannedStep]:
    config = load_config("quickstart", [*SMALL, "train.keep_every=4", *assignments], str(place))
    return {step.step: step for step in plan(config, catalog_if_any(str(place)))}


def test_the_same_weights_at_a_path_give_the_same_samples(guided: Outcome, place: Path, tmp_path: Path) -> None:
    trained = artifact_of(place, guided, "train", "checkpoint")
    folder = trained.directory("checkpoints/step-00000004")
    steps = planned(place, f"sample.guide={folder}")
    assert [name for name, step in steps.items() if step.action == "run" and "guide" in name] == ["guide"]
    with local_ray_train(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        again = pipeline(place, "train.keep_every=4", f"sample.guide={folder}")
    assert not again.failures
    ours, theirs = (artifact_of(place, outcome, "sample", "features") for outcome in (again, guided))
    assert ours.fingerprint != theirs.fingerprint
    assert ours.manifest.digest == theirs.manifest.digest
    assert ours.counts["guide_digest"] == theirs.counts["guide_digest"]  # so values are of one protocol
    catalog = Catalog(again.tracking_uri, "")
    tags = catalog.client.get_run(again.run_id).data.tags
    assert (tags["edt.guide_from"], tags["edt.guide_checkpoint"]) == (str(folder), trained.fingerprint)
    assert trained.fingerprint in roots(catalog, keep_runs=1, running=False)
    record = read_record(catalog, again.run_id)
    config, published = restored(record, catalog, str(tmp_path / "again"))
    planner = Planner(Store(Folder.at(tmp_path / "again")))
    with Terminal(to_stderr=True) as terminal:
        call_steps(planner, config, prepare_source(config.source, Folder.at(tmp_path), terminal), published)
    assert planner.steps["guide"].fingerprint == record.steps["guide"]
    assert planner.steps[f"sample {MODEL}"].fingerprint == record.steps[f"sample.{MODEL}"]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["extractors=[inception]", "promote.metric=fid"], "the classifier of the run chooses the class"),
        (["sample.cfg_scale=1"], "sample.cfg_scale is 1, which is no guidance"),
    ],
)
def test_confused_classes_need_a_classifier_and_a_scale(assignments: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config("quickstart", ["sample.guidance_reference=confused", *assignments])
    assert message in str(refused.value)


def test_a_version_carries_the_classifier_of_confused_classes(guided: Outcome, place: Path) -> None:
    """With the guide of half the steps: no training runs, and the folder draws the pipeline's own images."""
    from edt_core.autoencoders.autoencoder import decode_to_pixels

    confused = (*EARLIER, "sample.guidance_reference=confused", "sample.cfg_scale=3")
    with local_ray_train(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        outcome = pipeline(place, *confused)
    assert not outcome.failures
    again = outcome.decisions[MODEL].remeasured  # the champion of the session's run, by the same guidance
    assert again is not None
    assert not again.problem
    features = artifact_of(place, outcome, "sample", "features")
    version = outcome.decisions[MODEL].version
    use_mlflow(f"{MODEL}/{version}", outcome.tracking_uri, str(place))
    loaded = load_model(f"{MODEL}/{version}")
    assert (loaded.classifier is None, loaded.protocol["guidance_reference"]) == (False, "confused")
    config, units = SampleConfig.model_validate(features.manifest.config), load_units(features)
    first = slice(0, config.unit_size)
    classify = loaded.classify_by(loaded.autoencoder)
    guide = loaded.guide_of(config)
    sampler = LatentSampler(loaded.model, config, loaded.num_timesteps, guide, classify=classify)
    latents = sampler(units["labels"][first], config.seed, units["indices"][first])
    pixels = decode_to_pixels(loaded.autoencoder, latents, loaded.model.config)
    assert np.array_equal(pixels, units["images"][first])
    shown = edt("sample", f"{MODEL}/{version}", "--store", str(place), "--num", "1", "--out", str(place / "c.png"))
    assert shown.returncode == 0, shown.stderr


def test_a_guide_that_does_not_fit_is_refused_by_the_plan(guided: Outcome, place: Path) -> None:
    version = f"sample.guide={MODEL}/1"
    assert planned(place, version)["guide"].action == "run"
    with pytest.raises(UserError, match=r"EDT-Tiny/2 takes latents of 4 x 8 x 8 and 10 classes, but .* 4 x 16 x 16"):
        planned(place, version, "preprocess.image_size=64")
    with pytest.raises(UserError, match="predicts epsilon, but EDT-Tiny/2 predicts v_prediction"):
        planned(place, version, "train.objective=v_prediction")
    with pytest.raises(UserError, match=r"^sample.guide: .*nobody"):
        planned(place, "sample.guide=nobody@champion")


def test_the_record_of_a_run_without_a_guide_has_no_such_field(first: Outcome) -> None:
    record: Any = read_record(Catalog(first.tracking_uri, ""), first.run_id)
    assert record.config["sample"]["guide"] is None
    assert json.loads(json.dumps(record.config)) == record.config
    assert "guide: null" in as_yaml(load_config("quickstart"))


def test_edt_sample_and_show_name_it(guided: Outcome, place: Path, tmp_path: Path) -> None:
    version = f"{MODEL}/{guided.decisions[MODEL].version}"
    common = ("sample", version, "--store", str(place), "--classes", "3", "--num", "1")
    own = edt(*common, "--out", str(tmp_path / "a.png"))
    named = edt(*common, "--guide", f"{MODEL}/1", "--out", str(tmp_path / "b.png"))
    assert (own.returncode, named.returncode) == (0, 0), own.stderr + named.stderr
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
