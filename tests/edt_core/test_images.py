"""Decoding, the ADM crop, and the digits."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_core.config import SourceConfig
from edt_core.data.digits import NUM_DIGITS, write_digits
from edt_core.data.images import (
    center_crop,
    decode_rgb,
    encode_png,
    to_model_range,
)
from edt_core.data.sources import list_source, source_identity
from tests.support.images import reference_crop


@pytest.mark.parametrize("shape", [(300, 200), (64, 64), (65, 131), (31, 40), (128, 127), (8, 8)])
def test_center_crop_is_adm_s(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    cropped = np.asarray(center_crop(image, 32))
    assert cropped.shape == (32, 32, 3)
    assert np.array_equal(cropped, reference_crop(image, 32))


def test_center_crop_on_real_photos(photos: Path) -> None:
    paths = sorted(photos.glob("*/*.JPEG"))[::25]
    assert len(paths) == 10
    for path in paths:
        image = decode_rgb(path.read_bytes())
        assert np.array_equal(np.asarray(center_crop(image, 64)), reference_crop(image, 64)), path


def test_png_is_lossless_and_the_model_range_is_exact() -> None:
    pixels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    assert np.array_equal(np.asarray(decode_rgb(encode_png(Image.fromarray(pixels)))), pixels)
    images = to_model_range(pixels[None])
    assert images.shape == (1, 3, 32, 32)
    assert images.min() == -1.0
    assert images.max() == 1.0


def test_sixteen_bit_levels_are_scaled_not_clipped() -> None:
    import io

    levels = np.array([[0, 257 * 4], [257 * 100, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG")
    assert np.asarray(decode_rgb(buffer.getvalue()))[..., 0].tolist() == [[0, 4], [100, 255]]


def test_the_digits_are_written_once_and_whole(tmp_path: Path) -> None:
    root = write_digits(tmp_path / "digits")
    listing = list_source(SourceConfig(path=str(root)))
    assert (len(listing), len(listing.classes)) == (NUM_DIGITS, 10)
    identity = source_identity(listing)
    next(root.glob("3/*.png")).unlink()
    assert source_identity(list_source(SourceConfig(path=str(write_digits(root))))) == identity


def test_the_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    """The digest of names and pixels was taken when scikit-learn's loader still made them."""
    digest, root = hashlib.sha256(), write_digits(tmp_path / "digits")
    for path in sorted(root.glob("*/*.png")):
        digest.update(path.relative_to(root).as_posix().encode() + np.asarray(Image.open(path)).tobytes())
    assert digest.hexdigest() == "e20cc921cb3f93b34c50a68debf9fb1d394019c81f2da635ad23e8c9cf52cc60"


@pytest.mark.parametrize("shape", [(30, 9000), (9000, 30)])
def test_strips_are_cropped_as_adm_does(shape: tuple[int, int]) -> None:
    image = Image.effect_noise(shape, 60).convert("RGB")
    assert np.array_equal(np.asarray(center_crop(image, 256)), reference_crop(image, 256))


@pytest.mark.parametrize("shape", [(1, 30_000), (2, 89_000)])
def test_a_strip_that_would_grow_beyond_all_bounds_is_refused(shape: tuple[int, int]) -> None:
    """30,000 pixels in a column would be 1,966,080,000 on the way to 256 x 256, 8 GB."""
    with pytest.raises(
        ValueError, match=r"resize to 256 x 256 would need .* more than 89,478,485; the image is too narrow"
    ):
        center_crop(Image.new("RGB", shape), 256)
