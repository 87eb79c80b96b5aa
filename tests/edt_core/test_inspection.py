"""Images are decoded before a run: what cannot be read and what is stored sideways is found, in bounded time."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.images import is_turned
from edt_core.data.inspection import count_turned, inspect
from edt_core.data.sources import Listing, list_source


def photo(orientation: int | None = None) -> bytes:
    levels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(levels).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def listing(root: Path, number: int, special: dict[int, bytes]) -> Listing:
    """A folder of two classes with `number` images of each; `special` replaces some of the first class."""
    for name in "ab":
        (root / name).mkdir(parents=True)
        for k in range(number):
            (root / name / f"{k:03d}.jpg").write_bytes(special.get(k, photo()) if name == "a" else photo())
    return list_source(SourceConfig(path=str(root)))


def test_the_one_broken_image_and_all_turned_ones_of_a_small_set_are_found(tmp_path: Path) -> None:
    images = listing(tmp_path, 100, {7: photo()[:600], 20: photo(6), 21: photo(8), 22: photo(1)})
    found = inspect(images)
    assert (found.inspected, found.total, found.turned) == (200, 200, 2)
    assert [name for name, _ in found.unreadable] == ["a/007.jpg"]
    assert found.unreadable[0][1].startswith("OSError")
    assert set(found.sides) == {40}
    assert len(found.sides) == 199
    assert "1 of 200 images cannot be read (a/007.jpg: OSError" in found.unreadable_text()


def test_limits_end_an_inspection_after_images_of_all_classes(tmp_path: Path) -> None:
    images = listing(tmp_path, 100, {})
    assert inspect(images, most=70).extent == "70 of 200 images"
    hurried = inspect(images, seconds=0)
    assert hurried.inspected == 64  # the least
    first = images.take(np.arange(0, 200, 4)).table["label"].to_pylist()  # the first pass: each fourth image
    assert set(first) == {0, 1}


def test_a_file_that_may_not_be_read_is_reported_with_the_reason(tmp_path: Path) -> None:
    images = listing(tmp_path, 4, {})
    (tmp_path / "b" / "002.jpg").unlink()
    ((name, reason),) = inspect(images).unreadable
    assert name == "b/002.jpg"
    assert "No such file" in reason


@pytest.mark.parametrize(("orientation", "turned"), [(None, False), (1, False), (2, True), (6, True), (9, False)])
def test_an_orientation_other_than_upright_is_seen_in_the_header(orientation: int | None, turned: bool) -> None:
    assert is_turned(photo(orientation)) is turned


def test_what_is_no_image_has_no_orientation(tmp_path: Path) -> None:
    assert not is_turned(b"<html>404</html>")
    assert count_turned(listing(tmp_path, 5, {0: b"", 1: photo(3)})) == (1, 10)


@pytest.mark.parametrize(
    ("fraction", "images", "allowed"),
    [(0.001, 1, 1), (0.001, 404, 1), (0.001, 1000, 1), (0.001, 5000, 5), (0, 5000, 0), (0.29, 100, 29), (1, 7, 7)],
)
def test_a_set_of_any_size_may_have_one_unreadable_image_unless_none_is_allowed(
    fraction: float, images: int, allowed: int
) -> None:
    assert PreprocessConfig(max_bad_fraction=fraction).allowed_unreadable(images) == allowed
