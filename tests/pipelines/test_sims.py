"""`sample.guide: own-samples`: a copy of the model, trained on its own samples, is what samples are guided from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.config import SampleConfig
from edt_core.data.shards import load_images
from edt_core.errors import UserError
from jobs.models.open import load_model, use_mlflow
from jobs.stages.autoencoder import IMAGE_SHARDS
from jobs.stages.sample import averaged_model, load_units
from pipelines.config.guide import SimsConfig
from pipelines.config.schema import load_config
from pipelines.diff import outline
from pipelines.outcome import Outcome
from pipelines.registry.lineage import lineage
from pipelines.tracking.catalog import Catalog
from tests.support.local_ray import local_ray_train
from tests.support.runs import artifact_of
from tests.support.small import MODEL, copy_store, pipeline

OWN = ("sample.guide=own-samples", "sims.num_samples=50", "sims.train_steps=4")
STEPS = ("sample own", "images own", "encode own", "train own")


def test_its_steps_are_added_and_the_training_stays() -> None:
    plain, own = outline(load_config("quickstart")), outline(load_config("quickstart", OWN))
    assert set(own) - set(plain) == {f"{step} {MODEL}" for step in STEPS}
    assert own[f"train {MODEL}"] == plain[f"train {MODEL}"]
    assert own[f"sample {MODEL}"] != plain[f"sample {MODEL}"]
    longer = outline(load_config("quickstart", [*OWN, "sims.train_steps=5"]))
    assert longer[f"encode own {MODEL}"] == own[f"encode own {MODEL}"]
    assert longer[f"train own {MODEL}"] != own[f"train own {MODEL}"]


def test_its_samples_have_no_guidance_and_another_seed() -> None:
    config = load_config("quickstart", [*OWN, "sample.guidance_reference=confused", "sample.repeats=3"])
    drawn = config.sample.own_samples
    assert (drawn.cfg_scale, drawn.guidance_reference, drawn.repeats, drawn.keep_images) == (1.0, None, 1, "all")
    assert (drawn.sampler, drawn.num_sampling_steps) == (config.sample.sampler, config.sample.num_sampling_steps)
    assert drawn.seed > config.sample.seed + config.sample.repeats
    train = config.train_of(MODEL).model_copy(update={"patience": 2, "holdout": 0.1, "keep_every": 3, "max_hours": 1.0})
    copy = SimsConfig(train_steps=7).training_of(train)
    assert (copy.max_steps, copy.patience, copy.holdout, copy.keep_every, copy.max_hours) == (7, None, 0.0, None, None)
    assert (copy.model, copy.optimizer, copy.lr) == (train.model, train.optimizer, train.lr)


def test_few_trained_parameters_and_no_guidance_are_refused() -> None:
    few = ["train.init_from=x", "train.trainable=bias", "train.optimizer=adan"]
    with pytest.raises(UserError, match=r"sample.guide is own-samples, but .* \(train.trainable bias\)"):
        load_config("quickstart", [*OWN, *few])
    with pytest.raises(UserError, match=r"sample\.cfg_scale is 1, which is no guidance"):
        load_config("quickstart", [*OWN, "sample.cfg_scale=1"])


@pytest.fixture(scope="module")
def place(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished store of the session, to write to."""
    folder = tmp_path_factory.mktemp("sims") / "edt-store"
    copy_store(store, folder)
    return folder


@pytest.fixture(scope="module")
def sims(place: Path) -> Outcome:
    """The finished pipeline run again, away from what its model makes of its own samples."""
    with local_ray_train(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        outcome = pipeline(place, *OWN)
        again = pipeline(place, *OWN)
    assert (outcome.failures, again.failures, again.executed) == ({}, {}, 0)
    return outcome


def test_the_copy_is_trained_on_the_models_samples(sims: Outcome, place: Path) -> None:
    drawn, images = (
        artifact_of(place, sims, "sample own", "features"),
        artifact_of(place, sims, "images own", "own_images"),
    )
    units = load_units(drawn)
    pixels, labels = load_images(images.paths(IMAGE_SHARDS), images.counts["images"], 1000)
    assert np.array_equal(pixels, units["images"])  # without a loss
    assert np.array_equal(labels, units["labels"])
    assert images.counts["class_counts"] == np.bincount(labels, minlength=10).tolist()
    assert SampleConfig.model_validate(drawn.manifest.config).cfg_scale == 1.0
    trained, copy = artifact_of(place, sims, "train", "checkpoint"), artifact_of(place, sims, "train own", "checkpoint")
    assert copy.manifest.inputs == {
        "latents": artifact_of(place, sims, "encode own", "latents").fingerprint,
        "init": trained.fingerprint,
    }
    assert (copy.counts["steps"], copy.counts["class_counts"]) == (4, images.counts["class_counts"])
    before, after = averaged_model(trained, "cpu"), averaged_model(copy, "cpu")
    changes = [
        float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert 0 < max(changes) < 0.2  # a few steps from there, and not from random weights


def test_samples_are_away_from_the_copy_which_the_version_carries(sims: Outcome, place: Path) -> None:
    features, copy = artifact_of(place, sims, "sample", "features"), artifact_of(place, sims, "train own", "checkpoint")
    assert features.manifest.inputs["guide"] == copy.fingerprint
    assert features.counts["guide_digest"] == copy.manifest.digest
    version = sims.decisions[MODEL].version
    use_mlflow(f"{MODEL}/{version}", sims.tracking_uri, str(place))
    loaded = load_model(f"{MODEL}/{version}")
    assert loaded.guide is not None
    theirs, ours = loaded.guide.state_dict(), averaged_model(copy, "cpu").state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    nodes = lineage(Catalog(sims.tracking_uri, ""), f"{MODEL}/{version}").nodes
    trained = artifact_of(place, sims, "train", "checkpoint")
    assert nodes[copy.fingerprint].inputs["init"] == trained.fingerprint
    assert nodes[trained.fingerprint].kind == "checkpoint"
