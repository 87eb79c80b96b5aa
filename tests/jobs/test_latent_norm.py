"""Latents normalised by channel (train.latent_norm): from the statistics of the latents to every way to a picture.

The autoencoder has 16 channels of very different means and spreads. A twin of it states the same statistics in its own
configuration: a training with normalised latents must be the one that the twin's plain training is, bit for bit.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from edt_core.autoencoders.autoencoder import decode_to_pixels, load_autoencoder
from edt_core.autoencoders.kinds import scale_of
from edt_core.config import ChainConfig, EncodeConfig, SampleConfig, TrainConfig
from edt_core.data.holdout import Holdout
from edt_core.data.latents import LatentDataset
from edt_core.data.scale import LatentScale, model_scale, normalised
from edt_core.errors import UserError
from edt_core.models import ModelConfig, build_model, model_config
from edt_core.pipeline import EDTPipeline, save_pipeline
from edt_core.progress import Silent
from edt_core.sampling.sampler import LatentSampler
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import EMA_WEIGHTS, MODEL_CONFIG
from edt_core.training.checkpoint import ema_model
from edt_core.training.preview import Preview
from edt_core.training.ranks import Ranks
from edt_core.training.validation.measure import HeldOutLoss
from jobs.commands.draw import draw
from jobs.models.initial import initial_source
from jobs.models.open import load_model, open_model
from jobs.stages import encode, sample, train
from jobs.stages.autoencoder import FOLDER, published_artifact
from tests.support.autoencoders import uneven_autoencoder
from tests.support.jobs import execute
from tests.support.local_ray import local_ray, local_ray_train

RECIPE = {"model": "EDT-Tiny/2", "global_batch_size": 8, "max_steps": 2, "lr": 1e-3}
NORMALISED = TrainConfig(**RECIPE, latent_norm=True)
DRAWN = SampleConfig(num_samples=2, num_sampling_steps=2, keep_images="all", unit_size=2)
PROTOCOL = {"num_sampling_steps": 2}


@dataclass(frozen=True)
class Made:
    """An autoencoder, its latents, a training on them, samples of it, and its diffusers folder."""

    autoencoder: Artifact
    latents: Artifact
    checkpoint: Artifact
    samples: Artifact
    folder: Path

    @property
    def final(self) -> Path:
        return self.checkpoint.directory(self.checkpoint.counts["final"])

    @property
    def config(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.final / MODEL_CONFIG).read_text())
        return values

    @property
    def vae(self) -> Any:
        return load_autoencoder(self.autoencoder.directory(FOLDER))


def made_with(vae: Any, images: Artifact, work: Path, config: TrainConfig) -> Made:
    vae.save_pretrained(work / "vae")
    with local_ray():
        source = published_artifact(str(work / "vae"), Folder.at(work / "autoencoder"))
        latents = execute(encode.STAGE, EncodeConfig(), work / "latents", images=images, autoencoder=source)
    with local_ray_train():
        checkpoint = execute(train.STAGE, config, work / "checkpoint", latents=latents, autoencoder=source)
    with local_ray():
        samples = execute(sample.STAGE, DRAWN, work / "samples", checkpoint=checkpoint, autoencoder=source)
    model = ema_model(checkpoint.directory(checkpoint.counts["final"]))
    save_pipeline(work / "folder", model, vae, num_timesteps=1000, classes="abcd", protocol=PROTOCOL)
    return Made(source, latents, checkpoint, samples, work / "folder")


@pytest.fixture(scope="module")
def made(images: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """With `latent_norm`, of an autoencoder that states a scaling factor alone."""
    return made_with(uneven_autoencoder(), images, tmp_path_factory.mktemp("normalised"), NORMALISED)


@pytest.fixture(scope="module")
def twin(made: Made, images: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Without `latent_norm`, of an autoencoder that states the statistics of its channels."""
    vae, counts = uneven_autoencoder(), made.latents.counts
    vae.register_to_config(scaling_factor=1.0, latents_mean=counts["channel_mean"], latents_std=counts["channel_std"])
    return made_with(vae, images, tmp_path_factory.mktemp("twin"), TrainConfig(**RECIPE))


def pixels_of(samples: Artifact) -> np.ndarray:
    images: np.ndarray = sample.load_units(samples)["images"]
    return images


def test_the_statistics_are_those_of_the_latents_and_part_of_the_model(made: Made) -> None:
    counts = made.latents.counts
    assert max(counts["channel_std"]) / min(counts["channel_std"]) > 100
    assert made.config["latents_mean"] == counts["channel_mean"]
    assert made.config["latents_std"] == counts["channel_std"]
    dataset = LatentDataset(made.latents.paths("latents-*.arrow"))
    sides = [dataset.gather(np.arange(len(dataset)), np.full(len(dataset), side))[0] for side in (False, True)]
    mean, std = torch.from_numpy(np.concatenate(sides)).unbind(1)
    drawn = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    config = ModelConfig.from_dict(made.config)
    latents = model_scale(config, dataset.scale).to_model(drawn)
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05
    plain = dataset.scale.to_model(drawn).std((0, 2, 3))
    assert plain.max() / plain.min() > 100  # no scaling factor makes these equal


def test_a_training_is_that_of_an_autoencoder_with_these_statistics(made: Made, twin: Made) -> None:
    assert "latents_mean" not in twin.config
    assert (made.final / EMA_WEIGHTS).read_bytes() == (twin.final / EMA_WEIGHTS).read_bytes()
    assert train.history(made.checkpoint) == train.history(twin.checkpoint)
    with local_ray_train():
        plain = execute(train.STAGE, TrainConfig(**RECIPE), made.folder.parent / "plain", latents=made.latents)
    assert train.history(plain) != train.history(made.checkpoint)


def test_an_autoencoder_with_statistics_needs_none_in_the_model(twin: Made) -> None:
    assert train.config_of(NORMALISED, twin.latents.counts) == train.config_of(
        TrainConfig(**RECIPE), twin.latents.counts
    )


def test_held_out_loss_and_previews_are_those_of_normalised_latents(made: Made, twin: Made) -> None:
    rows, losses, grids = np.arange(8), [], []
    holdout = Holdout(rows, rows, np.frombuffer(bytes(range(256)), np.uint8).reshape(8, 32))
    for each in (made, twin):
        config, weights = ModelConfig.from_dict(each.config), dict(ema_model(each.final).state_dict())
        dataset = LatentDataset(each.latents.paths("latents-*.arrow"))
        losses.append(HeldOutLoss(NORMALISED, config, dataset, holdout, Ranks()).measure(weights))
        preview = Preview(config, 1000, each.autoencoder.directory(FOLDER), torch.device("cpu"))
        grids.append(preview.png(weights))
    assert losses[0] == losses[1]
    assert grids[0] == grids[1]


def test_samples_are_decoded_with_the_statistics(made: Made, twin: Made) -> None:
    assert np.array_equal(pixels_of(made.samples), pixels_of(twin.samples))
    plain = replace(ema_model(made.final).config, latents_mean=None, latents_std=None)
    latents = LatentSampler(ema_model(made.final), DRAWN, 1000)([0, 1], 0, range(2))
    assert not np.array_equal(decode_to_pixels(made.vae, latents, plain), pixels_of(made.samples))


def test_every_form_of_the_model_draws_the_same_pictures(made: Made, tmp_path: Path) -> None:
    chain = ChainConfig(**PROTOCOL)
    expected = None
    for place in (made.checkpoint.folder.uri, str(made.final), str(made.folder)):
        loaded = load_model(place)
        sampler = LatentSampler(loaded.model, chain, loaded.num_timesteps)
        images = draw(sampler, made.vae, [0, 3], 1, 5, Silent())[:, 0]  # as `edt sample` does
        assert expected is None or np.array_equal(images, expected)
        expected = images
    assert expected is not None
    through_diffusers = DiffusionPipeline.from_pretrained(
        made.folder, custom_pipeline=str(made.folder), trust_remote_code=True
    )
    for row, label in enumerate((0, 3)):
        assert np.array_equal(np.asarray(through_diffusers([label], seed=5).images[0]), expected[row])
    opened = open_model(str(made.folder), Folder.at(tmp_path))
    assert opened.autoencoder is not None
    of_folder = {"checkpoint": opened.checkpoint, "autoencoder": opened.autoencoder}
    with local_ray():
        samples = execute(sample.STAGE, DRAWN, tmp_path / "samples", **of_folder)
    assert np.array_equal(pixels_of(samples), pixels_of(made.samples))


def test_a_folder_states_the_scale_for_diffusers_equations(made: Made) -> None:
    pipeline = EDTPipeline.from_pretrained(made.folder)
    scale = pipeline.config.latent_scale
    latents = pipeline([0, 3], seed=5, output_type="latent").images
    mean, std = (torch.tensor(scale[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        images = pipeline.vae.decode(latents * std / scale["scaling_factor"] + mean).sample
    expected = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(pipeline([0, 3], seed=5).images), expected)
    assert scale_of(pipeline.vae) == LatentScale(0.18215)  # the autoencoder is as published


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
def test_a_folder_without_the_statistics_is_refused(made: Made, tmp_path: Path, file: str) -> None:
    path = shutil.copytree(made.folder, tmp_path / "folder") / file
    values = json.loads(path.read_text())
    fields = values if file == "model_index.json" else values["edt_config"]
    for name in ("latent_scale", "latents_mean", "latents_std"):
        fields.pop(name, None)
    path.write_text(json.dumps(values))
    for load in (EDTPipeline.from_pretrained, load_model):
        with pytest.raises(UserError, match=r"was trained on latents with .* use the files of its training"):
            load(str(tmp_path / "folder"))


def test_a_checkpoint_without_the_statistics_is_refused(made: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(made.final, tmp_path / "step")
    config = {name: value for name, value in made.config.items() if not name.startswith("latents_")}
    (folder / MODEL_CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model_config\.json does not match its digest"):
        load_model(str(folder))


def other_counts(latents: Artifact) -> dict[str, Any]:
    """The counts of latents whose statistics are others, as after a change of the images."""
    counts = latents.counts
    return {**counts, "channel_std": [2 * value for value in counts["channel_std"]]}


def test_a_training_from_a_model_keeps_the_statistics_of_that_model(made: Made, tmp_path: Path) -> None:
    config = NORMALISED.model_copy(update={"init_from": str(made.final), "max_steps": 1})
    latents = replace(made.latents, manifest=replace(made.latents.manifest, counts=other_counts(made.latents)))
    initial = initial_source(config)
    assert initial is not None
    with local_ray_train():
        further = execute(train.STAGE, config, tmp_path / "further", latents=latents, init=initial)
    after = further.read_json(f"{further.counts['final']}/{MODEL_CONFIG}")
    assert after["latents_std"] == made.config["latents_std"] != latents.counts["channel_std"]
    unset = config.model_copy(update={"latent_norm": False})  # the weights know no other latents
    assert train.config_of(unset, latents.counts, initial).latents_std == tuple(made.config["latents_std"])


def test_a_model_of_plain_latents_cannot_go_over_to_normalised_ones(made: Made, twin: Made) -> None:
    config = NORMALISED.model_copy(update={"init_from": str(twin.final)})
    initial = initial_source(config)
    with pytest.raises(UserError, match=r"not normalised by channel; set train\.latent_norm=false"):
        train.config_of(config, made.latents.counts, initial)
    assert train.config_of(config, twin.latents.counts, initial).latents_mean is None  # by its autoencoder


def test_what_a_training_starts_from_counts_with_its_statistics(made: Made, tmp_path: Path) -> None:
    with local_ray():
        models = [
            execute(train.STAGE, NORMALISED.model_copy(update={"max_steps": 0}), tmp_path / str(place), latents=latents)
            for place, latents in enumerate((made.latents, with_counts(made.latents, other_counts(made.latents))))
        ]
    weights = [model.path(f"{model.counts['final']}/{EMA_WEIGHTS}").read_bytes() for model in models]
    assert weights[0] == weights[1]
    sources = [initial_source(TrainConfig(init_from=model.folder.uri)) for model in models]
    assert len({source.fingerprint for source in sources if source is not None}) == 2


def with_counts(artifact: Artifact, counts: Mapping[str, Any]) -> Artifact:
    return replace(artifact, manifest=replace(artifact.manifest, counts=counts))


def test_statistics_that_cannot_be_are_refused(made: Made) -> None:
    counts = made.latents.counts
    with pytest.raises(UserError, match=r"no statistics of its channels; encode the images again"):
        train.config_of(NORMALISED, {name: value for name, value in counts.items() if name != "channel_std"})
    std = [0.0, *counts["channel_std"][1:]]
    with pytest.raises(UserError, match=r"1 of the 16 channels of the latents are constant \(0\)"):
        train.config_of(NORMALISED, {**counts, "channel_std": std})
    config = model_config("EDT-Tiny/2", 32, 4)
    for fields in (
        {"latents_mean": (0.0,) * 4},
        {"latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 3},
        {"latents_mean": (0.0,) * 4, "latents_std": (1.0, 0.0, 1.0, 1.0)},
        {"latents_mean": (float("nan"),) * 4, "latents_std": (1.0,) * 4},
    ):
        with pytest.raises(ValueError, match=r"both need a finite number for each of the 4 channels"):
            replace(config, **fields)
    assert not {"latents_mean", "latents_std"} & config.to_dict().keys()  # older configurations stay equal
    whole = normalised(config, {**counts, "channel_mean": [0.5] * 4, "channel_std": [2.0] * 4})
    assert ModelConfig.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


def test_a_guide_of_other_statistics_is_refused() -> None:
    config = model_config("EDT-Tiny/2", 32, 4)
    model, guide = build_model(replace(config, latents_mean=(0.0,) * 4, latents_std=(2.0,) * 4)), build_model(config)
    with pytest.raises(UserError, match=r"normalised by channel in another way"):
        LatentSampler(model, ChainConfig(num_sampling_steps=2, cfg_scale=2.0), 1000, guide)
