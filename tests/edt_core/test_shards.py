"""Image shards: the same bytes on every run, no short reads."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_core.data.images import encode_image
from edt_core.data.shards import ImageSample, load_images, read_image_shard, write_image_shard
from edt_core.errors import UserError


def samples(number: int, image_format: str = "webp") -> list[ImageSample]:
    rng = np.random.default_rng(number)
    images = rng.integers(0, 256, (number, 16, 16, 3), dtype=np.uint8)
    return [
        ImageSample(f"{i:08d}", encode_image(Image.fromarray(image), image_format), i % 3, f"c/{i}.png", f"{i:064x}")
        for i, image in enumerate(images)
    ]


def test_an_image_shard_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert write_image_shard(tmp_path / name, samples(5), "webp") == 5
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_image_shard_reads_back(tmp_path: Path) -> None:
    write_image_shard(tmp_path / "s.tar", samples(7), "webp")
    assert list(read_image_shard(tmp_path / "s.tar")) == samples(7)


@pytest.mark.parametrize(("image_format", "member"), [("webp", "webp"), ("png", "png"), ("jpeg", "jpg")])
def test_webdataset_reads_an_image_shard_as_anybody_would(tmp_path: Path, image_format: str, member: str) -> None:
    import webdataset

    write_image_shard(tmp_path / "s.tar", samples(4, image_format), image_format)
    read = list(
        webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode("rgb8").to_tuple(member, "cls")
    )
    assert [label for _, label in read] == [0, 1, 2, 0]
    assert np.array_equal(read[2][0], samples(4, image_format)[2].pixels())


def test_images_are_taken_at_even_distances(tmp_path: Path) -> None:
    write_image_shard(tmp_path / "0.tar", samples(30), "webp")
    pixels, labels = load_images([tmp_path / "0.tar"], 30, limit=10)
    assert len(pixels) == len(labels) == 10
    everything, _ = load_images([tmp_path / "0.tar"], 30)
    assert np.array_equal(pixels, everything[2::3])


def test_a_short_shard_is_not_read_in_silence(tmp_path: Path) -> None:
    write_image_shard(tmp_path / "0.tar", samples(9), "webp")
    with pytest.raises(UserError, match="contain 9 images, but their artifact states 10"):
        load_images([tmp_path / "0.tar"], 10)
