"""Autoencoders whose latents are centred: from encode to training, back to pixels, and into every other door.

Artifacts of versions that ignored shift_factor, latents_mean and latents_std are refused where they would be wrong.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edt_core.autoencoders.autoencoder import build_autoencoder, decode_to_pixels, load_autoencoder
from edt_core.config import AutoencoderConfig, EncodeConfig, SampleConfig, TrainConfig
from edt_core.data.latents import LatentDataset, LatentShard
from edt_core.data.loader import LatentBatch
from edt_core.data.scale import LatentScale
from edt_core.data.shards import read_image_shard
from edt_core.errors import UserError
from edt_core.pipeline import EDTPipeline, chain_config, save_pipeline
from edt_core.progress import Silent
from edt_core.sampling.sampler import LatentSampler
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.training.step import sampled_latents
from jobs.models.open import load_model, open_model
from jobs.stages import encode, sample, train
from jobs.stages.autoencoder import FOLDER, published_artifact
from jobs.stages.training.latents import open_latents
from pipelines.registry.importing import _digest
from tests.support.local_ray import local_ray
from tests.support.models import made_model

CENTRES, SPREADS = (2.5, 4.0, 0.5, 3.0), (1.0, 3.0, 0.5, 2.0)
KINDS = ("shift", "statistics")
UNTRAINED = TrainConfig(model="EDT-Tiny/2", max_steps=0)


def encoded(folder: Path, images: Artifact, vae: Artifact) -> Artifact:
    out, inputs = ArtifactWriter(Folder.at(folder), "latents", "2" * 64), {"images": images, "autoencoder": vae}
    with local_ray():
        return encode.STAGE.execute(EncodeConfig(write_webdataset=True), inputs, out, Silent())


@pytest.fixture(scope="module")
def made(images: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Artifact, Artifact]]:
    """An autoencoder far from centred, and its latents: plain, and with its true statistics in its configuration."""
    work = tmp_path_factory.mktemp("centred")
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32)
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= torch.tensor(SPREADS).view(4, 1, 1, 1)
        vae.quant_conv.bias[:4] += torch.tensor(CENTRES)
        vae.quant_conv.bias[4:] -= 4  # a standard deviation that is small beside the latents'
    found: dict[str, tuple[Artifact, Artifact]] = {}
    settings: dict[str, dict[str, Any]] = {"plain": {"scaling_factor": 0.5}}
    for name in ("plain", *KINDS):
        vae.register_to_config(**{"shift_factor": None, "latents_mean": None, **settings[name]})
        vae.save_pretrained(work / name / "vae")
        source = published_artifact(str(work / name / "vae"), Folder.at(work / name / "artifact"))
        found[name] = source, encoded(work / name / "latents", images, source)
        mean, std = (np.array(found["plain"][1].counts[f"channel_{key}"]) for key in ("mean", "std"))
        spread = float(np.sqrt((std**2 + mean**2).mean() - mean.mean() ** 2))
        settings["shift"] = {"shift_factor": float(mean.mean()), "scaling_factor": 1 / spread}
        settings["statistics"] = {"scaling_factor": 1.0, "latents_mean": mean.tolist(), "latents_std": std.tolist()}
    return found


def training_inputs(latents: Artifact, noise: float = 1.0) -> torch.Tensor:
    """Latents of all rows as a step of a training draws them."""
    dataset = LatentDataset(latents.paths("latents-*.arrow"))
    rows = np.arange(len(dataset))
    mirror = np.zeros(len(rows), bool)
    posterior, labels = (torch.from_numpy(values) for values in dataset.gather(rows, mirror))
    draws = noise * torch.randn(posterior[:, 0].shape, generator=torch.Generator().manual_seed(0))
    return sampled_latents(LatentBatch(0, rows, mirror, posterior, labels), draws, dataset.scale)


def pixels_of(images: Artifact) -> np.ndarray:
    return np.stack([s.pixels() for path in images.paths("images-*.tar") for s in read_image_shard(path)])


def test_a_plain_autoencoder_records_its_factor_alone(made: dict[str, tuple[Artifact, Artifact]]) -> None:
    source, latents = made["plain"]
    for counts in (source.counts, latents.counts):
        assert counts["scaling_factor"] == 0.5
        assert not {"shift_factor", "latents_mean", "latents_std"} & set(counts)
    assert training_inputs(latents).mean((0, 2, 3)).abs().max() > 1  # what a model would have to learn


def test_raw_latents_do_not_depend_on_the_scale(made: dict[str, tuple[Artifact, Artifact]]) -> None:
    plain, *others = (made[name][1] for name in ("plain", *KINDS))
    for latents in others:
        for path, other in zip(latents.paths("*.arrow"), plain.paths("*.arrow"), strict=True):
            assert np.array_equal(LatentShard(path).posterior(), LatentShard(other).posterior())


def test_training_gets_centred_latents_of_unit_variance(made: dict[str, tuple[Artifact, Artifact]]) -> None:
    by_channel = training_inputs(made["statistics"][1])
    assert by_channel.mean((0, 2, 3)).abs().max() < 0.05
    assert (by_channel.std((0, 2, 3)) - 1).abs().max() < 0.05
    shifted = training_inputs(made["shift"][1])
    assert abs(float(shifted.mean())) < 0.05
    assert abs(float(shifted.std()) - 1) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_both_readers_take_the_scale_of_the_autoencoder(made: dict[str, tuple[Artifact, Artifact]], kind: str) -> None:
    source, latents = made[kind]
    scale = LatentScale.of(json.loads((source.directory(FOLDER) / "config.json").read_text()))
    assert not scale.is_plain
    for reader in ("arrow", "webdataset"):
        assert open_latents(TrainConfig(reader=reader), latents, Silent()).scale == scale


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_decoded_latents_are_the_autoencoders_own_reconstruction(
    made: dict[str, tuple[Artifact, Artifact]], images: Artifact, kind: str
) -> None:
    source, latents = made[kind]
    model = load_autoencoder(source.directory(FOLDER))
    with torch.inference_mode():
        levels = torch.from_numpy(pixels_of(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        own = model.decode(model.encode(levels).latent_dist.mean).sample
    expected = (own * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = decode_to_pixels(model, training_inputs(latents, noise=0.0), None)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1  # of rounding
    assert (difference > 0).mean() < 0.01
    if kind != "plain":  # without the centre the pictures are others
        model.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)
        other = decode_to_pixels(model, training_inputs(latents, noise=0.0), None)
        assert np.abs(other.astype(int) - expected).max() > 5


@pytest.fixture(scope="module")
def folders(made: dict[str, tuple[Artifact, Artifact]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Diffusers folders of one model with each autoencoder."""
    work, model = tmp_path_factory.mktemp("folders"), made_model()
    for kind, (source, _) in made.items():
        vae, protocol = load_autoencoder(source.directory(FOLDER)), {"num_sampling_steps": 2}
        save_pipeline(work / kind, model, vae, num_timesteps=1000, classes="abcd", protocol=protocol)
    return {kind: work / kind for kind in made}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_folder_draws_what_diffusers_equations_give(folders: dict[str, Path], kind: str) -> None:
    pipeline = EDTPipeline.from_pretrained(folders[kind])
    chain = chain_config(pipeline.config.protocol)
    latents = LatentSampler(pipeline.transformer.edt, chain, 1000)([0, 3], 5, range(2))
    config = pipeline.vae.config
    if kind == "shift":
        raw = latents / config.scaling_factor + config.shift_factor
    else:
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (config.latents_mean, config.latents_std))
        raw = latents * std / config.scaling_factor + mean
    with torch.no_grad():
        images = pipeline.vae.decode(raw).sample
    expected = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(pipeline([0, 3], seed=5).images), expected)
    plain = np.stack(EDTPipeline.from_pretrained(folders["plain"])([0, 3], seed=5).images)
    assert not np.array_equal(plain, expected)


def test_folders_of_a_plain_autoencoder_have_no_new_field(folders: dict[str, Path]) -> None:
    kinds = {kind: json.loads((folder / "model_index.json").read_text()) for kind, folder in folders.items()}
    assert "latent_scale" not in kinds["plain"]
    assert {kind: set(kinds[kind]["latent_scale"]) for kind in KINDS} == {
        "shift": {"scaling_factor", "shift_factor"},
        "statistics": {"scaling_factor", "latents_mean", "latents_std"},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_a_version_that_ignored_the_centre_is_refused(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    older = shutil.copytree(folders[kind], tmp_path / "older")
    index = json.loads((older / "model_index.json").read_text())
    del index["latent_scale"]
    (older / "model_index.json").write_text(json.dumps(index))
    for load in (EDTPipeline.from_pretrained, load_model):
        with pytest.raises(UserError, match=r"which the version that trained the model ignored.*vae/config\.json"):
            load(str(older))
    config = json.loads((older / "vae" / "config.json").read_text())
    config |= dict.fromkeys(("shift_factor", "latents_mean", "latents_std"))  # as the message says
    (older / "vae" / "config.json").write_text(json.dumps(config))
    assert EDTPipeline.from_pretrained(older)([1], output_type="np").images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_opened_from_a_folder_fits_its_autoencoder(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    opened = open_model(str(folders[kind]), Folder.at(tmp_path))
    assert opened.autoencoder is not None
    inputs = {"checkpoint": opened.checkpoint, "autoencoder": opened.autoencoder}
    sample.check(SampleConfig(num_samples=4, keep_images="all"), inputs)
    older = replace_counts(opened.checkpoint, "shift_factor", "latents_mean", "latents_std")
    with pytest.raises(UserError, match=r"the model was made with scaling_factor alone, but its autoencoder has \{"):
        sample.check(SampleConfig(num_samples=4, keep_images="all"), {**inputs, "checkpoint": older})


def replace_counts(artifact: Artifact, *without: str) -> Artifact:
    """The artifact as a version wrote it that did not know these counts."""
    counts = {name: value for name, value in artifact.counts.items() if name not in without}
    return replace(artifact, manifest=replace(artifact.manifest, counts=counts))


@pytest.mark.parametrize("kind", KINDS)
def test_training_records_the_centre_and_refuses_latents_without_it(
    made: dict[str, tuple[Artifact, Artifact]], tmp_path: Path, kind: str
) -> None:
    source, latents = made[kind]

    def trained(latents: Artifact, folder: str) -> Artifact:
        out = ArtifactWriter(Folder.at(tmp_path / folder), "checkpoint", "3" * 64)
        return train.STAGE.execute(UNTRAINED, {"latents": latents, "autoencoder": source}, out, Silent())

    checkpoint = trained(latents, "new")
    named = {"shift_factor", "latents_mean", "latents_std"}
    assert {name: checkpoint.counts[name] for name in named & set(checkpoint.counts)} == {
        name: source.counts[name] for name in named & set(source.counts)
    }
    sample.check_autoencoder({"checkpoint": checkpoint, "autoencoder": source})
    older = replace_counts(latents, *named)
    with pytest.raises(UserError, match=r"latents artifact was made with scaling_factor alone.*encode again"):
        trained(older, "old")
    bare = replace_counts(checkpoint, *named)
    with pytest.raises(UserError, match=r"the model was made with scaling_factor alone.*train again"):
        sample.check_autoencoder({"checkpoint": bare, "autoencoder": source})


@pytest.mark.parametrize("kind", KINDS)
def test_an_autoencoder_artifact_of_an_older_version_is_encoded_with_its_centre(
    made: dict[str, tuple[Artifact, Artifact]], images: Artifact, tmp_path: Path, kind: str
) -> None:
    source, latents = made[kind]
    older = replace_counts(source, "shift_factor", "latents_mean", "latents_std")
    again = encoded(tmp_path, images, older)
    assert again.counts == latents.counts
    assert again.manifest.digest == latents.manifest.digest


def test_an_import_tells_autoencoders_apart_by_their_centre(made: dict[str, tuple[Artifact, Artifact]]) -> None:
    models = {kind: load_autoencoder(source.directory(FOLDER)) for kind, (source, _) in made.items()}
    for model in models.values():
        model.register_to_config(scaling_factor=0.5)
    assert len({_digest(model) for model in models.values()}) == 3
