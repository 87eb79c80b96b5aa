"""Image folders, the ADM crop, and the digits."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_core.data.digits import NUM_DIGITS, write_digits
from edt_core.data.images import (
    center_crop,
    decode_rgb,
    encode_png,
    scan_image_folder,
    source_digest,
    to_model_range,
)
from edt_core.errors import UserError


def reference_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop, spelled out as its paper's code does the steps, on whole arrays."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


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


def test_classes_are_sorted_and_indexed(digits_folder: Path) -> None:
    folder = scan_image_folder(digits_folder)
    assert folder.classes == ("0", "1", "2", "3")
    assert [label for _, label in folder.entries] == sorted(label for _, label in folder.entries)
    assert all(path.startswith(folder.classes[label]) for path, label in folder.entries)


def test_the_source_digest_is_of_content_alone(digits_folder: Path, tmp_path: Path) -> None:
    import os
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(digits_folder, copy)
    before = source_digest(scan_image_folder(copy))
    assert before == source_digest(scan_image_folder(digits_folder))
    first = next(copy.glob("*/*.png"))
    os.utime(first, (1, 1))
    assert source_digest(scan_image_folder(copy)) == before
    data = bytearray(first.read_bytes())
    data[-1] ^= 1  # same path, same size, same date
    first.write_bytes(data)
    os.utime(first, (1, 1))
    assert source_digest(scan_image_folder(copy)) != before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images in .*0 other files"),
        (["a/readme.txt", "b/notes.md"], "no images in .*2 other files"),
        (["only/1.png", "only/2.png"], "only one class .*'only', 2 images.*at least 2"),
    ],
)
def test_folders_that_cannot_be_trained_on(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        scan_image_folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        scan_image_folder(tmp_path / "nowhere")


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
    folder = scan_image_folder(root)
    assert (len(folder.entries), len(folder.classes)) == (NUM_DIGITS, 10)
    digest = source_digest(folder)
    next(root.glob("3/*.png")).unlink()
    assert source_digest(scan_image_folder(write_digits(root))) == digest
