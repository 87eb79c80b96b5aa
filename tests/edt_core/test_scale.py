"""Raw latents <-> latents of the model: diffusers' equations, and the bits of a plain factor as they always were."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.autoencoders.autoencoder import build_autoencoder, encode_posterior
from edt_core.autoencoders.kinds import scale_of
from edt_core.config import AutoencoderConfig
from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.data.loader import LatentBatch
from edt_core.data.scale import LatentScale
from edt_core.errors import UserError
from edt_core.training.step import sampled_latents

MEAN, STD = (2.5, -1.0, 0.25, 0.0), (0.5, 2.0, 1.0, 3.0)
SHIFTED = LatentScale(0.3611, 0.1159)
BY_CHANNEL = LatentScale(0.5, 0.0, MEAN, STD)
SHAPE = (4, 2, 2)


@pytest.fixture
def raw() -> torch.Tensor:
    return 3 * torch.randn((8, 4, 5, 5), generator=torch.Generator().manual_seed(0)) + 1


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


def test_a_plain_factor_keeps_the_bits_of_one_product_and_one_quotient(raw: torch.Tensor) -> None:
    raw[0, 0, 0, 0] = -0.0  # becomes 0.0 where something is added
    for values in ({}, {"shift_factor": None}, {"shift_factor": 0.0}, {"latents_mean": [0.0], "latents_std": [1.0]}):
        scale = LatentScale.of({"scaling_factor": 0.18215, **values})
        assert scale.is_plain
        assert scale.record() == {"scaling_factor": 0.18215}
        assert scale.beyond_factor() == {}
        assert same_bits(scale.to_model(raw), raw * 0.18215)
        assert same_bits(scale.to_raw(raw), raw / 0.18215)


def test_training_draws_have_the_bits_they_had_before_latents_were_centred(raw: torch.Tensor) -> None:
    posterior = torch.stack([raw, raw.abs()], dim=1)
    rows = np.arange(len(raw))
    batch = LatentBatch(0, rows, rows > 3, posterior, torch.from_numpy(rows))
    noise = torch.randn(raw.shape, generator=torch.Generator().manual_seed(1))
    drawn = sampled_latents(batch, noise, LatentScale(0.7))
    assert same_bits(drawn, (posterior[:, 0] + posterior[:, 1] * noise) * 0.7)
    assert not torch.allclose(sampled_latents(batch, noise, LatentScale(0.7, 0.5)), drawn, atol=0.1)


def test_a_shift_is_that_of_diffusers(raw: torch.Tensor) -> None:
    assert torch.equal(SHIFTED.to_model(raw), (raw - 0.1159) * 0.3611)
    latents = SHIFTED.to_model(raw)
    assert torch.equal(SHIFTED.to_raw(latents), latents / 0.3611 + 0.1159)
    assert torch.allclose(SHIFTED.to_raw(latents), raw, atol=1e-5)


def test_statistics_by_channel_are_those_of_diffusers(raw: torch.Tensor) -> None:
    latents = BY_CHANNEL.to_model(raw)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        assert torch.allclose(latents[:, channel], (raw[:, channel] - mean) * 0.5 / std, atol=1e-6)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))  # as Stable Diffusion XL's pipeline
    assert torch.equal(BY_CHANNEL.to_raw(latents), latents * std / 0.5 + mean)
    assert torch.allclose(BY_CHANNEL.to_raw(latents), raw, atol=1e-5)
    assert BY_CHANNEL.to_model(raw.double()).dtype == torch.float64


@pytest.mark.parametrize("scale", [LatentScale(0.5), SHIFTED, BY_CHANNEL])
def test_a_record_is_json_and_gives_the_scale_again(scale: LatentScale) -> None:
    assert LatentScale.of(json.loads(json.dumps(scale.record()))) == scale
    assert LatentScale.of({"scaling_factor": scale.scaling_factor, **scale.beyond_factor()}) == scale


def test_the_scale_of_an_autoencoder_is_that_of_its_configuration() -> None:
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 16)
    assert scale_of(vae) == LatentScale(0.18215)
    vae.register_to_config(shift_factor=0.5)
    assert scale_of(vae) == LatentScale(0.18215, 0.5)
    vae.register_to_config(shift_factor=None, latents_mean=list(MEAN), latents_std=list(STD))
    assert scale_of(vae) == LatentScale(0.18215, 0.0, MEAN, STD)
    assert encode_posterior(vae, np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 2, 4, 4, 4)


# --- what shards say


def test_shards_of_a_plain_autoencoder_say_what_they_always_said() -> None:
    metadata = LatentInfo("vae@0", LatentScale(0.7), 16, SHAPE, "images-00000.tar").to_metadata()
    assert list(metadata.items()) == [
        (b"autoencoder", b'"vae@0"'),
        (b"scaling_factor", b"0.7"),
        (b"image_size", b"16"),
        (b"latent_shape", b"[4, 2, 2]"),
        (b"source_shard", b'"images-00000.tar"'),
        (b"schema_version", b'"2"'),
    ]


@pytest.mark.parametrize("scale", [SHIFTED, BY_CHANNEL])
def test_shards_of_centred_latents_are_another_version(scale: LatentScale) -> None:
    info = LatentInfo("vae@0", scale, 16, SHAPE)
    metadata = info.to_metadata()
    assert metadata[b"schema_version"] == b'"3"'
    assert LatentInfo.from_metadata(metadata, "x") == info
    for version, values in (
        (b'"2"', metadata),
        (b'"3"', LatentInfo("vae@0", LatentScale(1.0), 16, SHAPE).to_metadata()),
    ):
        with pytest.raises(UserError, match=r"has latent schema ([23]), and expected is (?!\1)[23] "):
            LatentInfo.from_metadata({**values, b"schema_version": version}, "x")


def test_shards_that_are_centred_otherwise_do_not_mix(tmp_path: Path) -> None:
    paths = []
    for k, scale in enumerate((LatentScale(0.3611), SHIFTED)):
        paths.append(tmp_path / f"{k}.arrow")
        with LatentShardWriter(paths[-1], LatentInfo("vae", scale, 16, SHAPE, f"images-{k}.tar")) as writer:
            writer.write(["a"], [0], np.zeros((1, 2, 2, *SHAPE), np.float32))
    with pytest.raises(UserError, match=r"was encoded as .*'shift_factor': 0\.1159"):
        LatentDataset(paths)
    assert LatentDataset(paths[1:]).scale == SHIFTED
