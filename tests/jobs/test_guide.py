"""The stage `guide`: the averaged weights of another model, or of an earlier step, as an artifact of their own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.config import ChainConfig, GuideConfig, SampleConfig, TrainConfig
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer
from edt_core.progress import Silent
from edt_core.sampling.sampler import LatentSampler
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINTS, EMA_WEIGHTS, MODEL_CONFIG
from jobs.models.derived import write_model
from jobs.models.initial import named_model
from jobs.stages import sample
from jobs.stages.guide import step as guide
from tests.support.models import made_model, opened, pipeline_folder


def made(folder: Path, config: GuideConfig, **inputs: object) -> Artifact:
    fingerprints = {role: item.fingerprint for role, item in inputs.items()}  # type: ignore[attr-defined]
    out = ArtifactWriter(Folder.at(folder), "guide", guide.STAGE.fingerprint(config, fingerprints))
    return guide.STAGE.execute(config, inputs, out, Silent())  # type: ignore[arg-type]


def same(first: DiffusionTransformer, second: DiffusionTransformer) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_guide_has_the_weights_of_the_named_model(tmp_path: Path) -> None:
    weaker = made_model(seed=1)
    place = pipeline_folder(tmp_path / "p", weaker)
    source = named_model(str(place), "sample.guide")
    artifact = made(tmp_path / "guide", GuideConfig(), model=source)
    assert same(sample.averaged_model(artifact, "cpu"), weaker)
    assert artifact.manifest.inputs == {"model": source.fingerprint}
    facts = {name: artifact.counts[name] for name in ("model", "num_timesteps", "final")}
    assert facts == {"model": "EDT-Tiny/2", "num_timesteps": 1000, "final": "guide"}
    with pytest.raises(UserError, match=r"^sample.guide: there is no model at .*nowhere"):
        named_model(str(tmp_path / "nowhere"), "sample.guide")
    shutil.copytree(pipeline_folder(tmp_path / "other", made_model(seed=2)), place, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"^sample.guide: .* has changed since it was looked up"):
        source.read(TrainConfig())


def training(folder: Path, models: dict[int, DiffusionTransformer], steps: int) -> Artifact:
    """A checkpoint artifact with the averaged weights of some steps."""
    from safetensors.torch import save_file

    out = ArtifactWriter(Folder.at(folder), "checkpoint", "c" * 64)
    for step, model in models.items():
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        place = f"{CHECKPOINTS}/step-{step:08d}"
        write_model(out, place, model.config.to_dict(), lambda path, state=state: save_file(state, path))
    counts = {"steps": steps, "checkpoints": [f"step-{step:08d}" for step in models]}
    return out.commit({"num_timesteps": 500}, {}, {**counts, "final": f"{CHECKPOINTS}/step-{steps:08d}"})


def test_an_earlier_step_of_the_same_training(tmp_path: Path) -> None:
    models = {step: made_model(seed=step) for step in (4, 8)}
    trained = training(tmp_path / "checkpoint", models, 8)
    artifact = made(tmp_path / "guide", GuideConfig(step=4), checkpoint=trained)
    assert same(sample.averaged_model(artifact, "cpu"), models[4])
    assert artifact.manifest.inputs == {"checkpoint": trained.fingerprint}
    assert artifact.counts["num_timesteps"] == 500
    for step in (8, 6):
        with pytest.raises(UserError, match=rf"step-0000000{step}, but the training of 8 steps .* kept step-00000004"):
            made(tmp_path / f"{step}", GuideConfig(step=step), checkpoint=trained)


def test_a_served_and_a_derived_version_draw_away_from_the_guide(tmp_path: Path) -> None:
    """And from the class that their classifier chooses: both are in the folder, and stay in one made from it."""
    from types import SimpleNamespace

    from edt_core.autoencoders.autoencoder import build_autoencoder, decode_to_pixels
    from edt_core.config import AutoencoderConfig
    from edt_core.evaluation.extractors.classifier import Classifier
    from edt_core.pipeline import save_pipeline
    from jobs.models.open import load_model
    from jobs.serve.version import ImageSpec, ServedVersion, VersionName
    from pipelines.registry.derived.folder import write_derived

    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32)
    protocol = {"num_sampling_steps": 3, "cfg_scale": 3.0, "guidance_reference": "confused", "sampler": "ddim"}
    facts = {"num_timesteps": 1000, "classes": "abcd", "protocol": protocol}
    weaker, judge = made_model(seed=1), Classifier(4, base_channels=4, feature_dim=8)
    save_pipeline(tmp_path / "p", made_model(), vae, **facts, guide=weaker, classifier=judge)  # type: ignore[arg-type]
    loaded = load_model(str(tmp_path / "p"))
    write_derived(tmp_path / "d", SimpleNamespace(name="m", version="1", tags={}), loaded, loaded.protocol, {})
    chain = ChainConfig(**loaded.sampling)
    classify = loaded.classify_by(loaded.autoencoder)
    sampler = LatentSampler(loaded.model, chain, 1000, loaded.guide, classify=classify)
    expected = decode_to_pixels(loaded.autoencoder, sampler([3, 1], 5, [0, 1]), loaded.model.config)
    for folder in ("p", "d"):
        served = ServedVersion(VersionName("m", "1", ""), load_model(str(tmp_path / folder)), "cpu")
        images = served.draw(served.chain({}), [ImageSpec(3, 5, 0), ImageSpec(1, 5, 1)], 2)
        assert np.array_equal(np.stack(images), expected)
    unguided = LatentSampler(loaded.model, chain.model_copy(update={"guidance_reference": None}), 1000)
    assert not torch.equal(unguided([3, 1], 5, [0, 1]), sampler([3, 1], 5, [0, 1]))


def test_samples_are_refused_before_any_worker_starts(tmp_path: Path) -> None:
    model = opened(tmp_path, made_model())
    other = training(tmp_path / "checkpoint", {4: made_model(seed=4), 8: made_model(seed=8)}, 8)
    artifact = made(tmp_path / "guide", GuideConfig(step=4), checkpoint=other)
    assert model.autoencoder is not None
    inputs = {"checkpoint": model.checkpoint, "autoencoder": model.autoencoder, "guide": artifact}
    config = SampleConfig(num_samples=4, num_sampling_steps=2, keep_images="all", cfg_scale=2.0)
    with pytest.raises(UserError, match="the guide was trained with 500 timesteps, and the model with 1000"):
        sample.check(config, inputs)
    with pytest.raises(UserError, match="a guide with cfg_scale 1 has no effect"):
        sample.check(config.model_copy(update={"cfg_scale": 1.0}), inputs)
    assert {MODEL_CONFIG, EMA_WEIGHTS} == {Path(entry.path).name for entry in artifact.manifest.files}
