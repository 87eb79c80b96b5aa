"""encode, in this process: every kind of autoencoder, any batch size, lower precision with its error, no wrong byte."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.autoencoders.autoencoder import build_autoencoder, load_autoencoder
from edt_core.config import AutoencoderConfig, EncodeConfig
from edt_core.data.latents import LatentShard
from edt_core.data.latents.statistics import deviation
from edt_core.data.shards import read_image_shard, read_tar
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from jobs.stages import encode
from jobs.stages.autoencoder import published_artifact
from jobs.stages.encode import Encoder

BATCH_TOLERANCE = 1e-5  # in fp32: what another batch size may change


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return published_artifact(str(vae_folder), Folder.at(tmp_path_factory.mktemp("artifact")))


def writer(folder: Path) -> ArtifactWriter:
    return ArtifactWriter(Folder.at(folder), "latents", "2" * 64)


def encoded(images: Artifact, vae: Artifact, folder: Path, **fields: Any) -> list[np.ndarray]:
    """The posteriors of every shard, encoded in this process."""
    encoder = Encoder(EncodeConfig(**fields), {"images": images, "autoencoder": vae}, writer(folder), Silent(), "cpu")
    shards = range(len(images.entries("images-*.tar")))
    assert [encoder.work(k)["rows"] for k in shards] == [entry.rows for entry in images.entries("images-*.tar")]
    return [LatentShard(folder / f"latents-{k:05d}.arrow").posterior() for k in shards]


def test_latents_are_the_posterior_of_image_and_mirror(images: Artifact, vae: Artifact, tmp_path: Path) -> None:
    import torch

    model = load_autoencoder(vae.directory("autoencoder"))
    found = encoded(images, vae, tmp_path, batch_size=5)
    for k, path in enumerate(images.paths("images-*.tar")):
        pixels = np.stack([sample.pixels() for sample in read_image_shard(path)])
        for side, view in enumerate((pixels, pixels[:, :, ::-1])):
            levels = torch.from_numpy(np.ascontiguousarray(view)).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.inference_mode():
                posterior = model.encode(levels).latent_dist
            assert np.abs(found[k][:, side, 0] - posterior.mean.numpy()).max() < BATCH_TOLERANCE
            assert np.abs(found[k][:, side, 1] - posterior.std.numpy()).max() < BATCH_TOLERANCE


def test_on_a_cpu_the_batch_size_moves_nothing(images: Artifact, vae: Artifact, tmp_path: Path) -> None:
    one, many = (np.concatenate(encoded(images, vae, tmp_path / str(n), batch_size=n)) for n in (1, 12))
    assert one.tobytes() == many.tobytes()


def test_the_manifest_has_mean_and_std_by_channel(images: Artifact, vae: Artifact, tmp_path: Path, here: None) -> None:
    latents = encode.STAGE.execute(EncodeConfig(), {"images": images, "autoencoder": vae}, writer(tmp_path), Silent())
    rows = np.concatenate([LatentShard(path).posterior() for path in latents.paths("latents-*.arrow")])
    mean, std = rows[:, 0, 0].astype(np.float64), rows[:, 0, 1].astype(np.float64)
    assert np.allclose(latents.counts["channel_mean"], mean.mean((0, 2, 3)), rtol=1e-9)
    spread = np.sqrt((mean**2 + std**2).mean((0, 2, 3)) - mean.mean((0, 2, 3)) ** 2)
    assert np.allclose(latents.counts["channel_std"], spread, rtol=1e-9)
    assert not latents.entries("*.tar")  # the twin comes on request
    info = LatentShard(latents.paths("latents-*.arrow")[1]).info
    assert info.autoencoder.endswith(f"@{vae.manifest.digest}")
    assert (info.image_size, info.source_shard) == (32, "images-00001.tar")
    assert info.scale.scaling_factor == latents.counts["scaling_factor"] == vae.counts["scaling_factor"]


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 5e-2), ("fp16", 5e-3)])
def test_lower_precision_tells_its_error(
    precision: str, bound: float, images: Artifact, vae: Artifact, tmp_path: Path, here: None
) -> None:
    inputs = {"images": images, "autoencoder": vae}
    latents = encode.STAGE.execute(EncodeConfig(precision=precision), inputs, writer(tmp_path / "low"), Silent())
    error = latents.counts["precision_error"]
    assert 0 < error["rms"] < error["max"] < bound * 10
    assert error["rms"] < bound
    exact = encoded(images, vae, tmp_path / "exact")[0][:, 0, 0]
    low = LatentShard(latents.paths("latents-*.arrow")[0]).posterior()[:, 0, 0]
    assert np.abs(low - exact).max() / exact.std() == pytest.approx(error["max"], rel=1e-2)


def test_autoencoder_tiny_has_no_spread(images: Artifact, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    vae = published_artifact(str(tmp_path / "tiny"), Folder.at(tmp_path / "artifact"))
    assert vae.counts["downsample_factor"] == 4
    rows = encoded(images, vae, tmp_path / "latents")[0]
    assert rows.shape == (12, 2, 2, 4, 8, 8)
    assert rows[:, :, 0].std() > 0
    assert not rows[:, :, 1].any()


def test_the_webdataset_twin_has_the_same_rows_and_only_npy_and_json(
    images: Artifact, vae: Artifact, tmp_path: Path
) -> None:
    import io

    encoded(images, vae, tmp_path, write_webdataset=True)
    for k in range(3):
        shard = LatentShard(tmp_path / f"latents-{k:05d}.arrow")
        twin = list(read_tar(tmp_path / f"latents-{k:05d}.tar"))
        assert [key for key, _ in twin] == shard.keys.to_pylist()
        assert all(set(members) == {"posterior.npy", "json"} for _, members in twin)
        arrays = [np.load(io.BytesIO(members["posterior.npy"]), allow_pickle=False) for _, members in twin]
        assert np.array_equal(np.stack(arrays), shard.posterior())


def test_an_image_shard_with_one_flipped_bit_is_not_encoded(images: Artifact, vae: Artifact, tmp_path: Path) -> None:
    assert images.folder.local is not None
    images = Artifact.open(str(shutil.copytree(images.folder.local, tmp_path / "i")))
    path = images.paths("images-*.tar")[0]
    data = bytearray(path.read_bytes())
    data[700] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not match its manifest"):
        encoded(images, vae, tmp_path / "l")
    assert not list((tmp_path / "l").glob("*.arrow"))


def test_latents_that_are_not_finite_are_refused(images: Artifact, vae: Artifact, tmp_path: Path) -> None:
    inputs = {"images": images, "autoencoder": vae}
    encoder = Encoder(EncodeConfig(precision="fp16"), inputs, writer(tmp_path), Silent(), "cpu")
    encoder.model.encoder.conv_in.weight.data.fill_(6e4)
    with pytest.raises(UserError, match=r"not finite in fp16; set encode\.precision=fp32"):
        encoder.work(0)
    assert not list(tmp_path.glob("*.arrow"))


def test_an_image_size_that_does_not_fit_is_refused_with_the_numbers(images: Artifact, vae: Artifact) -> None:
    odd = replace(images, manifest=replace(images.manifest, counts={**images.counts, "image_size": 30}))
    with pytest.raises(UserError, match=r"30 px do not fit .* by 4"):
        encode.encode(EncodeConfig(), {"images": odd, "autoencoder": vae}, writer(Path("/nowhere")), Silent())


def test_finished_latent_shards_are_taken_over(images: Artifact, vae: Artifact, tmp_path: Path, here: None) -> None:
    dead = replace(writer(tmp_path), attempt="a1")
    encoder = Encoder(EncodeConfig(), {"images": images, "autoencoder": vae}, dead, Silent(), "cpu")
    encoder.work(1)
    before = (tmp_path / "a1" / "latents-00001.arrow").stat().st_ino
    new = replace(dead, attempt="a2", previous=("a1",))
    latents = encode.STAGE.execute(EncodeConfig(), {"images": images, "autoencoder": vae}, new, Silent())
    assert (tmp_path / "a2" / "latents-00001.arrow").stat().st_ino == before
    assert latents.counts["images"] == 32


def test_an_output_folder_keeps_to_one_autoencoder(vae_folder: Path, tmp_path: Path) -> None:
    first = published_artifact(str(vae_folder), Folder.at(tmp_path / "a"))
    assert published_artifact(str(vae_folder), Folder.at(tmp_path / "a")).manifest == first.manifest
    build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8, seed=1), 32).save_pretrained(
        tmp_path / "b"
    )
    with pytest.raises(UserError, match="contains another autoencoder"):
        published_artifact(str(tmp_path / "b"), Folder.at(tmp_path / "a"))


def test_weights_that_are_not_all_there_are_refused(vae_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(vae_folder, tmp_path / "vae")
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    del tensors["quant_conv.bias"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing or have another shape, quant_conv\.bias first"):
        load_autoencoder(tmp_path / "vae")


def test_a_channel_that_does_not_vary_has_a_deviation_of_0() -> None:
    """The mean of 0.1's squares is 2e-18 below the square of their mean."""
    assert 0.1 * 0.1 - 2e-18 < 0.1**2
    assert deviation(np.array([0.1, 1.0]), np.array([0.1**2 - 2e-18, 5.0])).tolist() == [0.0, 2.0]
