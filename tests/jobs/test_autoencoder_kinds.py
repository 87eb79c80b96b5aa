"""Autoencoders that are not Stable Diffusion's, from images to a pipeline that draws: DC-AE, 16 channels, and codes.

At 64 px: an AutoencoderDC of factor 32 makes latents of 32 x 2 x 2, an AutoencoderKL with a shift 16 x 8 x 8, and an
AutoencoderFSQ of factor 4 codes of 4 x 16 x 16, on which a MaskGIT is trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edt_core.autoencoders.autoencoder import load_autoencoder
from edt_core.autoencoders.kinds import scale_of
from edt_core.config import EncodeConfig, PreprocessConfig, SampleConfig, SourceConfig, TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.data.loader import LatentBatch
from edt_core.data.shards import read_image_shard
from edt_core.diffusion import train_defaults
from edt_core.errors import UserError
from edt_core.pipeline import EDTPipeline, save_pipeline
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.training.checkpoint import ema_model
from edt_core.training.step import sampled_latents
from jobs.models.open import load_model
from jobs.stages import encode, preprocess, sample, train
from jobs.stages.autoencoder import FOLDER, published_artifact
from jobs.stages.preprocess import image_source
from tests.support.autoencoders import coding_autoencoder, deep_autoencoder, shifted_autoencoder
from tests.support.jobs import execute
from tests.support.local_ray import local_ray, local_ray_train

TOKENS = {"model": "MaskGIT-Tiny"}
CASES: dict[str, tuple[Any, tuple[int, int, int], dict[str, Any]]] = {
    "DC": (deep_autoencoder, (32, 2, 2), {"model": "DiT-Tiny/2", "masked_loss": False}),
    "KL of 16 channels": (shifted_autoencoder, (16, 8, 8), {"model": "EDT-Tiny/2"}),
    "FSQ": (coding_autoencoder, (4, 16, 16), {**TOKENS, **train_defaults(TOKENS)}),
}
SCALES = {
    "DC": {"scaling_factor": 0.41407},
    "KL of 16 channels": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "FSQ": {"scaling_factor": 1.0},
}
CHAINS: dict[str, dict[str, Any]] = {"FSQ": {"sampler": "halton", "guidance_channels": None}}


@dataclass(frozen=True)
class Made:
    """The artifacts of one case, by their kinds, and a diffusers folder of its model."""

    case: str
    images: Artifact
    autoencoder: Artifact
    latents: Artifact
    checkpoint: Artifact
    samples: Artifact
    folder: Path

    @property
    def vae(self) -> Any:
        return load_autoencoder(self.autoencoder.directory(FOLDER))

    def pixels(self) -> np.ndarray:
        return np.stack([s.pixels() for path in self.images.paths("images-*.tar") for s in read_image_shard(path)])


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    work, (make, _, model) = tmp_path_factory.mktemp("kind"), CASES[request.param]
    make().save_pretrained(work / "vae")
    source = image_source(SourceConfig(path=str(digits_folder), limit=16))
    config = TrainConfig(global_batch_size=8, max_steps=2, checkpoint_every=2, num_workers=1, lr=1e-3, **model)
    fields = {"num_sampling_steps": 2, "cfg_scale": 1.5, **CHAINS.get(request.param, {})}
    drawn = SampleConfig(num_samples=4, keep_images="all", unit_size=4, **fields)
    with local_ray():
        images = execute(preprocess.STAGE, PreprocessConfig(image_size=64), work / "images", source=source)
        vae = published_artifact(str(work / "vae"), Folder.at(work / "autoencoder"))
        latents = execute(encode.STAGE, EncodeConfig(), work / "latents", images=images, autoencoder=vae)
    with local_ray_train():
        checkpoint = execute(train.STAGE, config, work / "checkpoint", latents=latents, autoencoder=vae)
    with local_ray():
        samples = execute(sample.STAGE, drawn, work / "samples", checkpoint=checkpoint, autoencoder=vae)
    trained = ema_model(checkpoint.directory(checkpoint.counts["final"]))
    save_pipeline(
        work / "pipeline",
        trained,
        load_autoencoder(vae.directory(FOLDER)),
        num_timesteps=1000,
        classes="abcd",
        protocol=fields,
    )
    return Made(request.param, images, vae, latents, checkpoint, samples, work / "pipeline")


def test_shards_hold_what_diffusers_own_encoder_gives(made: Made) -> None:
    _, shape, _ = CASES[made.case]
    counts = made.latents.counts
    assert tuple(counts["latent_shape"]) == shape
    assert {name: counts[name] for name in SCALES[made.case]} == SCALES[made.case]
    dataset = LatentDataset(made.latents.paths("latents-*.arrow"))
    rows, mirror = np.arange(16), np.arange(16) % 2 == 1
    posterior, _ = dataset.gather(rows, mirror)
    pixels = made.pixels()
    pixels[mirror] = pixels[mirror][:, :, ::-1]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()
    with torch.inference_mode():
        encoded = made.vae.encode(images)
    is_normal = made.case.startswith("KL")
    mean = encoded.latent_dist.mean if is_normal else getattr(encoded, "latent", encoded)
    std = encoded.latent_dist.std if is_normal else torch.zeros_like(mean)
    for found, expected in ((posterior[:, 0], mean), (posterior[:, 1], std)):
        assert np.allclose(found, expected, atol=1e-4 * float(mean.std()))
    assert mean.std() > 0.01


def test_training_draws_the_latents_of_a_deterministic_encoder_exactly(made: Made) -> None:
    dataset = LatentDataset(made.latents.paths("latents-*.arrow"))
    rows, mirror = np.arange(16), np.zeros(16, bool)
    posterior, labels = (torch.from_numpy(values) for values in dataset.gather(rows, mirror))
    batch = LatentBatch(0, rows, mirror, posterior, labels)
    noise = torch.randn(posterior[:, 0].shape, generator=torch.Generator().manual_seed(0))
    drawn = sampled_latents(batch, noise, dataset.scale)
    scale = SCALES[made.case]
    plain = (posterior[:, 0] - scale.get("shift_factor", 0.0)) * scale["scaling_factor"]
    assert torch.equal(drawn, plain) == (made.case in ("DC", "FSQ"))
    assert torch.equal(drawn, posterior[:, 0]) == (made.case == "FSQ")


def test_the_pipeline_decodes_as_diffusers_does(made: Made) -> None:
    assert made.samples.counts["samples"] == 4
    pipeline = EDTPipeline.from_pretrained(made.folder)
    assert type(pipeline.vae).__name__ == f"Autoencoder{made.case.partition(' ')[0]}"
    images = np.stack(pipeline([0, 3], seed=5).images)
    latents = pipeline([0, 3], seed=5, output_type="latent").images
    scale = SCALES[made.case]
    with torch.inference_mode():
        raw = latents / scale["scaling_factor"] + scale.get("shift_factor", 0.0)
        decoded = made.vae.decode(raw).sample
    expected = (decoded * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert images.shape == (2, 64, 64, 3)
    assert np.array_equal(images, expected)
    copy = EDTPipeline.from_pipe(pipeline)  # a part of a class that the pipeline does not name would be left out
    assert copy.vae is pipeline.vae


def test_the_verbs_open_the_folder_with_its_autoencoder(made: Made) -> None:
    model = load_model(str(made.folder))
    assert scale_of(model.autoencoder).record() == SCALES[made.case]
    assert model.model.config.in_channels == CASES[made.case][1][0]


def test_a_model_of_other_latents_is_refused_when_the_sizes_are_checked(made: Made) -> None:
    if made.case == "FSQ":
        with pytest.raises(UserError, match="predicts codes, but these latents are of an autoencoder without codes"):
            train.config_of(TrainConfig(**CASES["FSQ"][2]), {**made.latents.counts, "levels": None})
        return
    if made.case != "DC":
        assert train.config_of(TrainConfig(model="EDT-Tiny/2"), made.latents.counts).latent_size == 8
        return
    with pytest.raises(UserError, match=r"latents of 2x2 cannot be cut.* Models for 2x2: DiT-S/2, "):
        train.config_of(TrainConfig(model="EDT-Tiny/2"), made.latents.counts)
