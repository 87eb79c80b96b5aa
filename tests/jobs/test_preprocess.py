"""preprocess on real photos and on hostile ones: exact pixels, nothing lost, nothing silently wrong."""

import hashlib
import io
import json
import os
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.images import MAX_PIXELS, center_crop, decode_rgb, encode_image
from edt_core.data.shards import read_image_shard
from edt_core.data.sources import list_source
from edt_core.data.tables import DigestRows
from edt_core.data.tables.repeats import repeats_among
from edt_core.errors import UserError
from edt_core.progress import CollectedWarnings, Silent
from edt_core.store.artifact import Artifact, ArtifactWriter, Source
from edt_core.store.folder import Folder
from jobs.stages import preprocess
from jobs.stages.preprocess import image_source
from tests.support.images import reference_crop
from tests.support.local_ray import local_ray

SHARDS = "images-*.tar"


def run(folder: Path, out: Path, progress: Silent | None = None, **fields: object) -> Artifact:
    config = PreprocessConfig.model_validate({"image_size": 32, "max_bad_fraction": 1, **fields})
    source = image_source(SourceConfig(path=str(folder)))
    identity = preprocess.STAGE.fingerprint(config, {"source": source.fingerprint})
    writer = ArtifactWriter(Folder.at(out), "images", identity)
    return preprocess.STAGE.execute(config, {"source": source}, writer, progress or Silent())


def samples(artifact: Artifact) -> dict[str, np.ndarray]:
    return {s.source: s.pixels() for path in artifact.paths(SHARDS) for s in read_image_shard(path)}


@pytest.mark.parametrize("each", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [256, 64])
def test_every_sample_photo_is_cropped_as_adm_does(photos: Path, size: int, each: int) -> None:
    """Bit for bit: our decode, crop and lossless formats against the formula applied with Pillow to the same pixels."""
    paths = sorted(photos.glob("*/*.JPEG"))
    assert len(paths) == 250
    for path in paths[::each]:
        expected = reference_crop(Image.open(path).convert("RGB"), size)
        image = center_crop(decode_rgb(path.read_bytes()), size)
        for image_format in ("webp", "png"):
            stored = np.asarray(Image.open(io.BytesIO(encode_image(image, image_format))))
            assert np.array_equal(stored, expected), (path, image_format)


# --- hostile images: name -> bytes, and what becomes of them


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 48)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of 100 bytes that says it is side x side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def sixteen_bit() -> bytes:
    levels = np.random.default_rng(0).integers(0, 65536, (40, 40), dtype=np.uint16)
    return saved(Image.fromarray(levels), "PNG")


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture(), "JPEG", exif=exif)


def animated() -> bytes:
    frames = [picture("P"), Image.new("P", (40, 48), 7), Image.new("P", (40, 48), 9)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


HOSTILE = {
    "truncated.jpg": saved(picture(), "JPEG")[:700],
    "truncated.png": saved(picture(), "PNG")[:3000],
    "zero.jpg": b"",
    "text.jpg": b"<html>404</html>",
    "bomb.png": bomb(50_000),
    "large.png": bomb(10_000),
    "float.tif": saved(Image.fromarray(np.ones((40, 40), np.float32)), "TIFF"),
}
STRANGE = {
    "cmyk.jpg": saved(picture("CMYK"), "JPEG"),
    "grey.jpg": saved(picture("L"), "JPEG"),
    "deep.png": sixteen_bit(),
    "palette.png": saved(picture("P"), "PNG", transparency=bytes(range(256))),
    "alpha.png": saved(picture("RGBA"), "PNG"),
    "animated.gif": animated(),
    "rotated.jpg": rotated(),
    "png-named.jpg": saved(picture(), "PNG"),
    "one-pixel.png": saved(picture(size=(1, 1)), "PNG"),
    "thin.png": saved(picture(size=(3, 900)), "PNG"),
    "twin-1.png": saved(picture(size=(33, 33)), "PNG"),
    "twin-2.png": saved(picture(size=(33, 33)), "PNG"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "images"
    for k, (name, data) in enumerate({**HOSTILE, **STRANGE}.items()):
        (root / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[k % 2] / name).write_bytes(data)
    with open(os.fsencode(root / "a") + b"/not-utf8-\xff.png", "wb") as file:
        file.write(saved(picture(), "PNG"))
    return root


@pytest.fixture(scope="module")
def taken(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with local_ray():
        return run(hostile, tmp_path_factory.mktemp("taken"), images_per_shard=4)


def test_every_hostile_image_is_taken_or_quarantined_with_its_reason(taken: Artifact) -> None:
    counts = taken.counts
    assert counts["found"] == len(HOSTILE) + len(STRANGE) + 1
    assert counts["images"] + counts["quarantined"] == counts["found"]
    reasons = {Path(row["path"]).name: row["reason"] for row in counts["quarantined_images"]}
    assert set(reasons) == set(HOSTILE)
    assert all(reasons.values())
    assert "decompression bomb" in reasons["bomb.png"]
    assert f"10000 x 10000 pixels, more than {MAX_PIXELS}: a decompression bomb" in reasons["large.png"]
    assert {Path(name).name for name in samples(taken)} == {*STRANGE, "not-utf8-\\xff.png"}
    assert counts["duplicates"] == 2  # the twins, and the PNG that has two names
    reports = [taken.read_json(entry.path) for entry in taken.entries("reports/*.json")]
    assert sum(len(report["quarantined"]) for report in reports) == len(HOSTILE)


def test_strange_images_are_handled_as_documented(taken: Artifact, hostile: Path) -> None:
    found = {Path(name).name: pixels for name, pixels in samples(taken).items()}

    def expected(image: Image.Image) -> np.ndarray:
        return reference_crop(image.convert("RGB"), 32)

    for name in ("cmyk.jpg", "grey.jpg", "palette.png", "alpha.png", "rotated.jpg", "animated.gif", "thin.png"):
        assert np.array_equal(found[name], expected(Image.open(io.BytesIO(STRANGE[name])))), name
    levels = np.asarray(Image.open(io.BytesIO(STRANGE["deep.png"])))
    assert np.array_equal(found["deep.png"], expected(Image.fromarray((levels / 257).round().astype(np.uint8))))
    assert np.array_equal(found["png-named.jpg"], found["not-utf8-\\xff.png"])
    assert np.array_equal(found["twin-1.png"], found["twin-2.png"])


def test_photos_can_be_turned_upright(hostile: Path, tmp_path: Path, here: None) -> None:
    turned = samples(run(hostile, tmp_path / "o", rotate_by_exif=True))
    upright = decode_rgb(STRANGE["rotated.jpg"]).transpose(Image.Transpose.ROTATE_270)
    name = next(name for name in turned if name.endswith("rotated.jpg"))
    assert np.array_equal(turned[name], reference_crop(upright, 32))


def test_too_many_fail_the_step_and_the_first_ten_are_listed(hostile: Path, tmp_path: Path, here: None) -> None:
    for k in range(8):
        path = hostile / "b" / f"bad-{k}.png"
        path.write_bytes(b"bad")
    try:
        with pytest.raises(UserError, match=r"15 of 28 images \(53.57%.*\) could not be read") as error:
            run(hostile, tmp_path / "o", max_bad_fraction=0.1, images_per_shard=100)
    finally:
        for k in range(8):
            (hostile / "b" / f"bad-{k}.png").unlink()
    text = str(error.value)
    assert len([line for line in text.splitlines() if line.startswith("  ") and ": " in line]) == 10
    assert "and 5 more" in text
    assert "Repair or remove them" in text
    assert not (tmp_path / "o" / "manifest.json").exists()


def test_names_and_bytes_do_not_depend_on_the_order_of_the_shards(
    hostile: Path, taken: Artifact, tmp_path: Path
) -> None:
    """What Ray's tasks make is compared with the same in test_data_faults.py and tests/test_packaging.py."""
    config = PreprocessConfig(image_size=32, images_per_shard=4)
    plans = preprocess.plan_shards(list_source(SourceConfig(path=str(hostile))), config)
    out = ArtifactWriter(Folder.at(tmp_path / "reverse"), "images", "0" * 64)
    for plan in reversed(plans):
        preprocess.build_shard(plan, config, out, lambda done: None)
    made = {entry.path: entry for entry in out.written()}
    kept = {entry.path: entry for entry in taken.manifest.files if entry.path != "classes.json"}
    assert made == kept


def test_shards_are_cut_by_bytes_as_well_as_by_count(digits_folder: Path, tmp_path: Path) -> None:
    listing = list_source(SourceConfig(path=str(digits_folder)))
    assert [len(p.listing) for p in preprocess.plan_shards(listing, PreprocessConfig(images_per_shard=12))] == [
        12,
        12,
        8,
    ]
    config = PreprocessConfig(image_size=256, max_shard_bytes=1 << 20)
    plans = preprocess.plan_shards(listing, config)
    assert [len(plan.listing) for plan in plans] == [5, 5, 5, 5, 5, 5, 2]
    out = ArtifactWriter(Folder.at(tmp_path), "images", "0" * 64)
    noise = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (256, 256, 3), dtype=np.uint8)) for i in range(5)
    ]
    folder = tmp_path / "noise"
    for i, image in enumerate(noise):  # nothing compresses less
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        image.save(folder / str(i % 2) / f"{i}.png")
    plan = preprocess.plan_shards(list_source(SourceConfig(path=str(folder))), config)[0]
    for image_format in ("webp", "png"):
        preprocess.build_shard(plan, config.model_copy(update={"image_format": image_format}), out, lambda done: None)
        assert (tmp_path / plan.name).stat().st_size <= config.max_shard_bytes
    with pytest.raises(UserError, match="one image of 4096 px may take"):
        preprocess.images_per_shard(PreprocessConfig(image_size=4096, max_shard_bytes=1 << 20))


def test_jpeg_shards_say_what_they_are(digits_folder: Path, tmp_path: Path, here: None) -> None:
    heard = CollectedWarnings()
    lossy = run(digits_folder, tmp_path / "o", heard, image_format="jpeg", jpeg_quality=80)
    assert lossy.counts["lossless"] is False
    assert lossy.manifest.config["jpeg_quality"] == 80
    assert any("FID references from lossless" in warning for warning in heard.warnings)
    member = next(read_image_shard(lossy.paths(SHARDS)[0])).data
    assert Image.open(io.BytesIO(member)).format == "JPEG"


def test_a_faster_decoder_is_in_the_manifest_and_close(photos: Path, tmp_path: Path, here: None) -> None:
    pytest.importorskip("simplejpeg", reason="simplejpeg is an extra")
    folder = tmp_path / "s"
    for path in sorted(photos.glob("*/*.JPEG"))[:6]:
        (folder / path.parent.name).mkdir(parents=True)
        (folder / path.parent.name / path.name).symlink_to(path)
    fast, plain = (run(folder, tmp_path / d, decoder=d, image_size=64) for d in ("simplejpeg", "pillow"))
    assert fast.manifest.config["decoder"] == "simplejpeg"
    assert fast.fingerprint != plain.fingerprint
    pairs = [
        (a.astype(int), b.astype(int)) for a, b in zip(samples(fast).values(), samples(plain).values(), strict=True)
    ]
    assert all(np.abs(a - b).mean() < 3 for a, b in pairs)


def test_a_sample_tells_what_it_was_made_from(taken: Artifact, hostile: Path) -> None:
    import hashlib

    for item in read_image_shard(taken.paths(SHARDS)[0]):
        if "not-utf8" not in item.source:
            assert item.sha256 == hashlib.sha256((hostile / item.source).read_bytes()).hexdigest()


def test_a_source_that_changes_while_it_is_read_is_refused(digits_folder: Path, tmp_path: Path, here: None) -> None:
    source = image_source(SourceConfig(path=str(digits_folder)))
    stale = Source(source.location, "0" * 64, source.selection)
    with pytest.raises(UserError, match="changed while they were read"):
        preprocess.STAGE.execute(
            PreprocessConfig(image_size=32),
            {"source": stale},
            ArtifactWriter(Folder.at(tmp_path), "images", "1" * 64),
            Silent(),
        )
    assert not (tmp_path / "manifest.json").exists()


def test_finished_shards_are_taken_over_and_a_spoiled_one_is_not(
    digits_folder: Path, tmp_path: Path, here: None
) -> None:
    config = PreprocessConfig(image_size=32, images_per_shard=8)
    source = image_source(SourceConfig(path=str(digits_folder)))
    identity = preprocess.STAGE.fingerprint(config, {"source": source.fingerprint})
    dead = ArtifactWriter(Folder.at(tmp_path), "images", identity, "a1")
    plans = preprocess.plan_shards(list_source(SourceConfig(path=str(digits_folder))), config)
    for plan in plans[:3]:
        preprocess.build_shard(plan, config, dead, lambda done: None)
    inodes = [(tmp_path / "a1" / plan.name).stat().st_ino for plan in plans[:3]]
    spoiled = tmp_path / "a1" / plans[1].name
    data = bytearray(spoiled.read_bytes())
    data[1000] ^= 1
    spoiled.write_bytes(data)
    new = replace(dead, attempt="a2", previous=("a1",))
    artifact = preprocess.STAGE.execute(config, {"source": source}, new, Silent())
    taken = [(tmp_path / "a2" / plan.name).stat().st_ino == inode for plan, inode in zip(plans, inodes, strict=False)]
    assert taken == [True, False, True]
    assert artifact.manifest.digest == run(digits_folder, tmp_path / "whole", images_per_shard=8).manifest.digest
    assert json.loads((tmp_path / "a2" / "classes.json").read_text()) == ["0", "1", "2", "3"]


def test_a_stricter_bound_holds_for_what_was_made_before_and_a_laxer_one_keeps_the_work(
    hostile: Path, tmp_path: Path, here: None
) -> None:
    with pytest.raises(UserError, match="is kept"):
        run(hostile, tmp_path, max_bad_fraction=0.1, images_per_shard=100)
    (before,) = [path.stat().st_ino for path in tmp_path.glob("images-*.tar")]
    artifact = run(hostile, tmp_path, max_bad_fraction=0.9, images_per_shard=100)
    assert [path.stat().st_ino for path in artifact.paths(SHARDS)] == [before]
    strict = PreprocessConfig(image_size=32, max_bad_fraction=0.1)
    with pytest.raises(UserError, match="more than max_bad_fraction"):
        preprocess.STAGE.accept(strict, artifact.counts)
    assert preprocess.STAGE.fingerprint(strict, {}) == preprocess.STAGE.fingerprint(PreprocessConfig(image_size=32), {})


def folder_of(root: Path, good: int, bad: int) -> Path:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for k in range(good):
            (root / name / f"{k:02d}.png").write_bytes(saved(picture(size=(32 + k, 40)), "PNG"))
    for k in range(bad):
        (root / "a" / f"bad-{k}.jpg").write_bytes(HOSTILE["truncated.jpg"])
    return root


def test_one_broken_image_of_a_few_does_not_stop_the_default_and_is_counted(tmp_path: Path, here: None) -> None:
    said = CollectedWarnings()
    artifact = run(folder_of(tmp_path / "i", 10, 1), tmp_path / "o", said, max_bad_fraction=0.001)
    assert (artifact.counts["images"], artifact.counts["quarantined"]) == (20, 1)
    assert any("1 of 21 images could not be read" in warning for warning in said.warnings)
    with pytest.raises(UserError, match=r"1 of 21 images .* max_bad_fraction 0.00% allows \(here 0\)"):
        run(tmp_path / "i", tmp_path / "none", max_bad_fraction=0)


def test_the_message_about_too_many_gives_an_assignment_that_is_enough(tmp_path: Path, here: None) -> None:
    root = folder_of(tmp_path / "i", 10, 3)
    with pytest.raises(UserError, match=r"--set preprocess\.max_bad_fraction=") as error:
        run(root, tmp_path / "o", max_bad_fraction=0.001)
    fraction = re.search(r"--set preprocess\.max_bad_fraction=([\d.]+)", str(error.value))
    assert fraction is not None
    assert run(root, tmp_path / "o", max_bad_fraction=float(fraction[1])).counts["quarantined"] == 3


def test_images_that_are_all_broken_are_not_to_be_left_out(tmp_path: Path, here: None) -> None:
    root = folder_of(tmp_path / "i", 0, 3)
    (root / "b" / "bad.jpg").write_bytes(HOSTILE["text.jpg"])
    with pytest.raises(UserError, match="none of the 4 images could be read") as error:
        run(root, tmp_path / "o", max_bad_fraction=1)
    assert "max_bad_fraction" not in str(error.value)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0099, 1 / 404, 3 / 23, 29 / 100, 1 / 1_281_167])
def test_a_suggested_fraction_allows_the_share_and_no_more_than_twice_it(share: float) -> None:
    assert share <= preprocess.enough_fraction(share) <= 2 * share + 1e-12


def test_photos_with_an_orientation_are_reported_unless_they_are_turned(tmp_path: Path, here: None) -> None:
    root = folder_of(tmp_path / "i", 3, 0)
    (root / "a" / "phone.jpg").write_bytes(STRANGE["rotated.jpg"])
    said, turned = CollectedWarnings(), CollectedWarnings()
    counts = run(root, tmp_path / "o", said).counts
    assert (counts["turned"], counts["turned_of"]) == (1, 7)
    assert any("--set preprocess.rotate_by_exif=true" in warning for warning in said.warnings)
    assert "turned" not in run(root, tmp_path / "t", turned, rotate_by_exif=True).counts
    assert not any("EXIF" in warning for warning in turned.warnings)


def test_classes_that_lose_all_images_and_images_of_two_classes_are_told(tmp_path: Path, here: None) -> None:
    for name, data in {
        "ant/1.png": saved(picture(size=(33, 32)), "PNG"),
        "ant/2.png": saved(picture(size=(34, 32)), "PNG"),
        "bee/1.png": b"no image",
        "cat/1.png": saved(picture(size=(33, 32)), "PNG"),
        "cat/note.txt": b"x",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    told = CollectedWarnings()
    counts = run(tmp_path / "in", tmp_path / "out", told, images_per_shard=2).manifest.counts
    assert (counts["images"], counts["quarantined"], counts["class_counts"]) == (3, 1, [2, 0, 1])
    assert (counts["under_several_classes"], counts["left_out"]) == (1, {".txt": 1})
    text = "\n".join(told.warnings)
    assert "1 of 3 classes have no images: 'bee'" in text
    assert "1 images are in more than one class" in text
    assert "ant/1.png = cat/1.png" in text


def test_repeats_are_counted_as_sets_count_them() -> None:
    rng = np.random.default_rng(0)
    for images in (2, 5, 60):
        which = rng.integers(0, images, 100)
        kept, labels = rng.random(100) < 0.8, rng.integers(0, 3, 100).astype(np.int32)
        digests = [hashlib.sha256(bytes([number])).digest() for number in which]
        rows = DigestRows(len(digests))
        rows.write(0, b"".join(digests))
        found = repeats_among(rows, np.flatnonzero(kept), labels[kept])
        by_digest: dict[bytes, set[int]] = {}
        for digest, label in zip(np.array(digests, dtype=object)[kept], labels[kept], strict=True):
            by_digest.setdefault(digest, set()).add(int(label))
        several = [digest for digest, classes in by_digest.items() if len(classes) > 1]
        assert found.duplicates == kept.sum() - len(by_digest)
        assert found.under_several_classes == len(several)
        assert len(found.examples) == min(10, len(several))
        for one, other in found.examples:
            assert which[kept][one] == which[kept][other]
            assert labels[kept][one] != labels[kept][other]
