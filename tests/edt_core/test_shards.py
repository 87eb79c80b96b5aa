"""Image shards and latent shards: the same bytes on every run, the same rows in both formats, no short reads."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from edt_core.data.images import encode_png
from edt_core.data.latents import (
    LatentDataset,
    LatentInfo,
    LatentRows,
    LatentShard,
    write_latent_shard,
    write_latent_tar,
)
from edt_core.data.shards import ImageSample, load_images, read_image_shard, read_tar, write_image_shard
from edt_core.errors import UserError
from edt_core.schema import LATENT_TAR_MEMBER

INFO = LatentInfo("vae@0", 0.7, 32, (4, 8, 8), "images-00000.tar")


def samples(number: int) -> list[ImageSample]:
    rng = np.random.default_rng(number)
    images = rng.integers(0, 256, (number, 16, 16, 3), dtype=np.uint8)
    return [
        ImageSample(f"{i:08d}", encode_png(Image.fromarray(image)), i % 3, f"c/{i}.png")
        for i, image in enumerate(images)
    ]


def latent_rows(number: int, seed: int = 0) -> LatentRows:
    rng = np.random.default_rng(seed)
    posterior = rng.normal(size=(number, 4, 4, 8, 8)).astype(np.float32)
    return LatentRows(tuple(f"{i:08d}" for i in range(number)), rng.integers(0, 10, number), posterior)


def test_an_image_shard_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert write_image_shard(tmp_path / name, samples(5)) == 5
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_image_shard_reads_back(tmp_path: Path) -> None:
    write_image_shard(tmp_path / "s.tar", samples(7))
    assert list(read_image_shard(tmp_path / "s.tar")) == samples(7)


def test_webdataset_reads_an_image_shard_as_anybody_would(tmp_path: Path) -> None:
    import webdataset

    write_image_shard(tmp_path / "s.tar", samples(4))
    read = list(
        webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    )
    assert [label for _, label in read] == [0, 1, 2, 0]
    assert np.array_equal(read[2][0], samples(4)[2].pixels())


def test_images_are_taken_at_even_distances(tmp_path: Path) -> None:
    write_image_shard(tmp_path / "0.tar", samples(30))
    pixels, labels = load_images([tmp_path / "0.tar"], 30, limit=10)
    assert len(pixels) == len(labels) == 10
    everything, _ = load_images([tmp_path / "0.tar"], 30)
    assert np.array_equal(pixels, everything[2::3])


def test_a_short_shard_is_not_read_in_silence(tmp_path: Path) -> None:
    write_image_shard(tmp_path / "0.tar", samples(9))
    with pytest.raises(UserError, match="hold 9 images where 10 are stated"):
        load_images([tmp_path / "0.tar"], 10)


def test_arrow_and_webdataset_latents_hold_the_same_rows(tmp_path: Path) -> None:
    rows = latent_rows(11)
    assert write_latent_shard(tmp_path / "l.arrow", rows, INFO) == write_latent_tar(tmp_path / "l.tar", rows) == 11
    shard = LatentShard(tmp_path / "l.arrow")
    read = shard.rows()
    twin = [(json.loads(m["json"]), np.load(_buffer(m[LATENT_TAR_MEMBER]))) for _, m in read_tar(tmp_path / "l.tar")]
    assert shard.info == INFO
    assert read.keys == rows.keys == tuple(about["key"] for about, _ in twin)
    assert read.labels.tolist() == rows.labels.tolist() == [about["label"] for about, _ in twin]
    assert np.array_equal(read.posterior, rows.posterior)
    assert np.array_equal(np.stack([array for _, array in twin]), rows.posterior)


def test_latents_are_views_of_the_file(tmp_path: Path) -> None:
    write_latent_shard(tmp_path / "l.arrow", latent_rows(11), INFO)
    before = pa.total_allocated_bytes()
    shard = LatentShard(tmp_path / "l.arrow")
    assert pa.total_allocated_bytes() - before < 4096  # labels and keys; the columns alone are 45 kB
    assert not shard.columns[0].flags.owndata


@pytest.mark.parametrize("part", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_cut_arrow_file_is_refused(tmp_path: Path, part: float) -> None:
    write_latent_shard(tmp_path / "l.arrow", latent_rows(50), INFO)
    data = (tmp_path / "l.arrow").read_bytes()
    (tmp_path / "l.arrow").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match="not a whole Arrow file"):
        LatentShard(tmp_path / "l.arrow")


def test_gather_takes_rows_and_mirrors_from_any_shard(tmp_path: Path) -> None:
    parts = [latent_rows(5, seed=1), latent_rows(8, seed=2)]
    for k, rows in enumerate(parts):
        write_latent_shard(tmp_path / f"{k}.arrow", rows, INFO)
    dataset = LatentDataset([tmp_path / "0.arrow", tmp_path / "1.arrow"])
    everything = np.concatenate([rows.posterior for rows in parts])
    labels = np.concatenate([rows.labels for rows in parts])
    indices, mirror = np.array([12, 0, 4, 5, 7, 0]), np.array([False, True, False, True, False, False])
    mean, std, found = dataset.gather(indices, mirror)
    assert len(dataset) == 13
    assert np.array_equal(mean, everything[indices, np.where(mirror, 2, 0)])
    assert np.array_equal(std, everything[indices, np.where(mirror, 3, 1)])
    assert np.array_equal(found, labels[indices])


def test_shards_of_two_autoencoders_do_not_mix(tmp_path: Path) -> None:
    write_latent_shard(tmp_path / "0.arrow", latent_rows(3), INFO)
    write_latent_shard(tmp_path / "1.arrow", latent_rows(3), LatentInfo("other", 0.7, 32, (4, 8, 8)))
    with pytest.raises(UserError, match="was encoded as"):
        LatentDataset([tmp_path / "0.arrow", tmp_path / "1.arrow"])


def _buffer(data: bytes):
    import io

    return io.BytesIO(data)
