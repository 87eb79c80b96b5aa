"""preprocess takes unchanged images from earlier artifacts, and the artifact is what it would be from nothing."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.shards import ImageSample, read_image_shard, write_image_shard
from edt_core.errors import UserError
from edt_core.progress import CollectedWarnings, Silent
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import sha256_file
from edt_core.store.manifest import Manifest
from edt_core.store.store import Store
from jobs.stages import preprocess
from jobs.stages.preprocess import image_source
from jobs.stages.reuse import image_shard, siblings
from tests.support.local_ray import local_ray

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def here_with_every_artifact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Ray's calls in this process; rows are taken from any number of artifacts, made within one second as they are."""
    monkeypatch.setattr(siblings, "MOST_SIBLINGS", 1000)
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "cache"))
    with local_ray():
        yield


def picture(image_format: str = "png") -> bytes:
    buffer = io.BytesIO()
    levels = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(levels).save(buffer, format=image_format)
    return buffer.getvalue()


def write(root: Path, classes: int = 3, each: int = 6) -> Path:
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
        for k in range(each):
            (root / f"class{label}" / f"{k}.png").write_bytes(picture())
    return root


def make(store: Path, root: Path, progress: Silent | None = None, **fields: object) -> Artifact:
    fields = {"image_size": 16, "images_per_shard": 5, "max_bad_fraction": 1, **fields}
    return made_of(image_source(SourceConfig(path=str(root))), store, progress, **fields)


def made_of(source: Source, store: Path, progress: Silent | None = None, **fields: object) -> Artifact:
    config = PreprocessConfig.model_validate(fields)
    identity = preprocess.STAGE.fingerprint(config, {"source": source.fingerprint})
    if existing := Store.open(str(store)).find("images", identity):
        return existing
    out = Store.open(str(store)).writer("images", identity)
    return preprocess.STAGE.execute(config, {"source": source}, out, progress or Silent())


def rows(artifact: Artifact) -> int:
    reused = artifact.manifest.reused
    return 0 if reused is None else reused["rows"]


def assert_same(one: Artifact, other: Artifact) -> None:
    assert one.manifest.files == other.manifest.files
    assert one.counts == other.counts
    assert one.fingerprint == other.fingerprint
    assert one.manifest.digest == other.manifest.digest


def originals(root: Path) -> set[str]:
    return {sha256_file(path) for path in root.rglob("*.*")}


def test_added_images_alone_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "images")
    first = make(tmp_path / "store", root)
    assert first.manifest.reused is None
    assert "reused" not in json.loads((first.folder.local / "manifest.json").read_text())  # type: ignore[operator]
    (root / "class1" / "new.png").write_bytes(picture())
    decoded: list[bytes] = []
    plain = image_shard.prepare
    monkeypatch.setattr(image_shard, "prepare", lambda data, config: decoded.append(data) or plain(data, config))
    second = make(tmp_path / "store", root)
    checked = second.manifest.reused["checked"]  # type: ignore[index]
    assert second.manifest.reused == {"rows": 18, "checked": checked, "from": {first.fingerprint: 18}}
    assert checked == 4, "one of each shard"
    assert len(decoded) == 1 + checked
    monkeypatch.undo()
    with local_ray():
        assert_same(second, make(tmp_path / "nothing", root))
    assert Manifest.from_json(second.manifest.to_json(), "it") == second.manifest


def test_a_removed_image_is_in_no_new_shard(tmp_path: Path) -> None:
    root = write(tmp_path / "images")
    make(tmp_path / "store", root)
    gone = (root / "class0" / "2.png").read_bytes()
    (root / "class0" / "2.png").unlink()
    second = make(tmp_path / "store", root)
    assert rows(second) == 17
    digests = [sample.sha256 for path in second.paths("images-*.tar") for sample in read_image_shard(path)]
    assert len(digests) == 17
    assert hashlib.sha256(gone).hexdigest() not in digests
    assert_same(second, make(tmp_path / "nothing", root))


def test_a_renamed_class_moves_labels_and_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "images")
    make(tmp_path / "store", root)
    (root / "class0").rename(root / "zebra")
    second = make(tmp_path / "store", root)
    assert rows(second) == 18
    assert second.read_json("classes.json") == ["class1", "class2", "zebra"]
    assert_same(second, make(tmp_path / "nothing", root))


def test_an_image_that_cannot_be_decoded_is_remembered_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path / "images")
    (root / "class1" / "3.png").write_bytes(b"no image")
    first = make(tmp_path / "store", root)
    (root / "class2" / "new.png").write_bytes(picture())
    monkeypatch.setattr(siblings, "_CHECKED_SHARE", 0.0)
    second = make(tmp_path / "store", root)
    assert rows(second) == 18
    assert second.counts["quarantined_images"] == first.counts["quarantined_images"]
    assert_same(second, make(tmp_path / "nothing", root))


def test_what_shapes_an_image_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "images")
    make(tmp_path / "store", root)
    assert rows(make(tmp_path / "store", root, image_size=24)) == 0
    assert rows(make(tmp_path / "store", root, image_format="png")) == 0
    assert rows(make(tmp_path / "store", root, image_format="jpeg")) == 0
    assert rows(make(tmp_path / "store", root, image_format="jpeg", jpeg_quality=80)) == 0
    assert rows(make(tmp_path / "store", root, rotate_by_exif=True)) == 0
    assert rows(make(tmp_path / "store", root, jpeg_quality=80)) == 18, "which shapes no WebP"
    assert rows(make(tmp_path / "store", root, images_per_shard=7)) == 18
    (root / "class0" / "new.png").write_bytes(picture())
    monkeypatch.setattr("jobs.stages.reuse.images.environment", lambda: {"pillow": "0.1", "machine": "abacus"})
    assert rows(make(tmp_path / "store", root)) == 0


# --- a history of changes


def add(root: Path) -> None:
    (root / f"class{RNG.integers(3)}" / f"new{RNG.integers(1 << 30)}.png").write_bytes(picture())


def remove(root: Path) -> None:
    chosen(root).unlink()


def rename(root: Path) -> None:
    path = chosen(root)
    path.rename(path.with_name(f"other{RNG.integers(1 << 30)}.png"))


def move(root: Path) -> None:
    path = chosen(root)
    path.rename(root / f"class{RNG.integers(3)}" / f"moved{RNG.integers(1 << 30)}.png")


def encode_again(root: Path) -> None:
    chosen(root).write_bytes(picture("jpeg"))


def spoil(root: Path) -> None:
    chosen(root).write_bytes(RNG.bytes(50))


def double(root: Path) -> None:
    path = chosen(root)
    shutil.copy(path, root / f"class{RNG.integers(3)}" / f"double{RNG.integers(1 << 30)}.png")


def swap_classes(root: Path) -> None:
    (root / "class0").rename(root / ".third")
    (root / "class1").rename(root / "class0")
    (root / ".third").rename(root / "class1")


def chosen(root: Path) -> Path:
    crowded = [path for path in sorted(root.glob("*/*")) if len(list(path.parent.iterdir())) > 1]
    return crowded[RNG.integers(len(crowded))]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_the_artifact_is_that_from_nothing(seed: int, tmp_path: Path) -> None:
    global RNG
    RNG = np.random.default_rng(seed)
    root = write(tmp_path / "images")
    steps: list[Callable[[Path], None]] = [add, remove, rename, move, encode_again, spoil, double, swap_classes]
    seen = originals(root)
    make(tmp_path / "store", root)
    for number in range(6):
        for place in RNG.integers(len(steps), size=RNG.integers(1, 4)):
            steps[place](root)
        known = sum(sha256_file(path) in seen for path in root.rglob("*.*"))
        is_new = len(Store.open(str(tmp_path / "store")).manifests("images"))
        warned = CollectedWarnings()
        artifact = make(tmp_path / "store", root, warned)
        if len(Store.open(str(tmp_path / "store")).manifests("images")) > is_new:
            assert rows(artifact) == known, number
        assert not [warning for warning in warned.warnings if "reused" in warning]
        seen |= originals(root)
        assert_same(artifact, make(tmp_path / f"nothing{number}", root))


# --- rows that are wrong


def planted(artifact: Artifact, change: Callable[[ImageSample], ImageSample]) -> None:
    """Rewrite an artifact's samples, with digests and a seal that agree."""
    entries = {entry.path: entry for entry in artifact.manifest.files}
    for path in artifact.paths("images-*.tar"):
        number = write_image_shard(path, list(map(change, list(read_image_shard(path)))), "webp")
        name = path.name
        entries[name] = replace(entries[name], bytes=path.stat().st_size, sha256=sha256_file(path), rows=number)
    manifest = replace(artifact.manifest, files=tuple(entries.values()))
    assert artifact.folder.local is not None
    (artifact.folder.local / "manifest.json").write_text(manifest.to_json())


def other_pixels(sample: ImageSample) -> ImageSample:
    pixels = 255 - sample.pixels()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="webp", lossless=True)
    return replace(sample, data=buffer.getvalue())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_pixels, "differs from what is made of its original now"),
        (lambda sample: replace(sample, sha256="0" * 64), "not the one in its report"),
    ],
)
def test_a_wrong_row_is_found_and_nothing_is_reused(
    change: Callable[[ImageSample], ImageSample], message: str, tmp_path: Path
) -> None:
    root = write(tmp_path / "images")
    first = make(tmp_path / "store", root)
    planted(first, change)
    (root / "class1" / "new.png").write_bytes(picture())
    warned = CollectedWarnings()
    second = make(tmp_path / "store", root, warned)
    assert second.manifest.reused is None
    (warning,) = [text for text in warned.warnings if "reused" in text]
    assert message in warning
    assert first.folder.uri in warning
    assert_same(second, make(tmp_path / "nothing", root))


def test_one_wrong_row_in_a_shard_that_was_finished_before_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample hits the last shard alone; shards before it have copied rows that nobody compared."""
    root = write(tmp_path / "images")
    first = make(tmp_path / "store", root)
    planted(first, other_pixels)
    (root / "class2" / "new.png").write_bytes(picture())
    plain = siblings.checked_rows

    def last_alone(reused: np.ndarray, fingerprint: str, shard: int) -> np.ndarray:
        return plain(reused, fingerprint, shard) if shard == 3 else np.zeros(len(reused), np.bool_)

    monkeypatch.setattr("jobs.stages.reuse.images.checked_rows", last_alone)
    assert_same(make(tmp_path / "store", root), make(tmp_path / "nothing", root))


def test_a_damaged_shard_is_not_copied_from(tmp_path: Path) -> None:
    root = write(tmp_path / "images")
    first = make(tmp_path / "store", root)
    path = first.paths("images-*.tar")[1]
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    (root / "class1" / "new.png").write_bytes(picture())
    warned = CollectedWarnings()
    second = make(tmp_path / "store", root, warned)
    assert any("does not match its manifest" in text for text in warned.warnings)
    assert_same(second, make(tmp_path / "nothing", root))


def test_a_damaged_report_leaves_its_artifact_out(tmp_path: Path) -> None:
    root = write(tmp_path / "images")
    first = make(tmp_path / "store", root)
    report = first.paths("reports/*")[0]
    report.write_text(report.read_text().replace("a", "b"))
    (root / "class1" / "new.png").write_bytes(picture())
    second = make(tmp_path / "store", root)
    assert rows(second) == 0
    assert_same(second, make(tmp_path / "nothing", root))


def test_a_source_that_is_not_what_it_was_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "images")
    make(tmp_path / "store", root)
    (root / "class1" / "new.png").write_bytes(picture())
    source = image_source(SourceConfig(path=str(root)))
    (root / "class1" / "0.png").rename(root / "class1" / "00.png")
    with pytest.raises(UserError, match="changed while they were read"):
        made_of(source, tmp_path / "store", image_size=16)
    (root / "class1" / "00.png").rename(root / "class1" / "0.png")
    (root / "class1" / "new.png").write_bytes(picture())  # which is read, as it is in no artifact
    with pytest.raises(UserError, match="--digest-again"):
        made_of(source, tmp_path / "store", image_size=16)


def test_an_image_that_one_artifact_has_is_not_quarantined_because_another_could_not_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a machine that was short of memory: the newest artifact lacks it."""
    root = write(tmp_path / "images", classes=2, each=3)
    make(tmp_path / "store", root)
    (root / "class0" / "new.png").write_bytes(picture())
    prepare, bad = image_shard.prepare, (root / "class1" / "1.png").read_bytes()

    def short_of_memory(data: bytes, config: PreprocessConfig) -> bytes:
        if data == bad:
            raise OSError("broken data stream")
        return prepare(data, config)

    with monkeypatch.context() as patch:
        patch.setattr(image_shard, "prepare", short_of_memory)
        lacking = make(tmp_path / "other", root)
    assert lacking.counts["quarantined"] == 1
    shutil.copytree(lacking.folder.local, tmp_path / "store" / "images" / lacking.fingerprint)  # type: ignore[arg-type]
    (root / "class0" / "newer.png").write_bytes(picture())
    third = make(tmp_path / "store", root)
    assert third.counts["quarantined"] == 0
    assert_same(third, make(tmp_path / "nothing", root))


def test_about_a_hundredth_is_computed_again() -> None:
    reused = np.ones(5000, np.bool_)
    reused[::2] = False
    one, again = (siblings.checked_rows(reused, "ab" * 32, 3) for _ in range(2))
    assert one.sum() == 25
    assert not one[~reused].any()
    assert np.array_equal(one, again)
    assert not np.array_equal(one, siblings.checked_rows(reused, "ab" * 32, 4))
    assert not np.array_equal(one, siblings.checked_rows(reused, "cd" * 32, 3))
    assert siblings.checked_rows(np.array([False, True]), "ab" * 32, 0).tolist() == [False, True]
    assert not siblings.checked_rows(np.zeros(4, np.bool_), "ab" * 32, 0).any()


# --- remote sources


class Shop:
    """A folder of a store in memory: its files have version tokens, and reads are counted."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import fsspec

        self.fs, self.uri, self.reads = fsspec.filesystem("memory"), f"memory://{name}/images", 0
        plain = type(self.fs).cat_file

        def cat_file(fs: object, path: str, *arguments: object, **named: object) -> bytes:
            self.reads += 1
            return plain(fs, path, *arguments, **named)

        monkeypatch.setattr(type(self.fs), "cat_file", cat_file)

    def write(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.uri}/{name}", data)


def remote_images(shop: Shop, store: Path, progress: Silent | None = None) -> Artifact:
    fields = {"image_size": 16, "images_per_shard": 5, "max_bad_fraction": 1}
    return made_of(image_source(SourceConfig(path=shop.uri)), store, progress, **fields)


def test_remote_images_are_known_by_their_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(tmp_path.name, monkeypatch)
    for label in range(3):
        for k in range(4):
            shop.write(f"class{label}/{k}.png", picture())
    shop.write("class0/broken.png", b"no image")
    first = remote_images(shop, tmp_path / "store")
    assert "versions" in first.read_json("reports/images-00000.tar.json")
    shop.write("class1/2.png", picture())
    shop.write("class2/new.png", picture())
    shop.fs.rm_file(f"{shop.uri}/class0/1.png")
    shop.reads = 0
    second = remote_images(shop, tmp_path / "store")
    assert second.manifest.reused is not None
    checked = second.manifest.reused["checked"]
    assert (second.manifest.reused["rows"], shop.reads) == (11, 2 + checked)
    assert_same(second, remote_images(shop, tmp_path / "nothing"))


def test_a_version_that_stays_while_the_bytes_change_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose tokens say nothing: a row is compared with its original, and nothing is reused."""
    monkeypatch.setattr("edt_core.data.sources.listing._version_digest", lambda row: bytes(32))
    monkeypatch.setattr(siblings, "_CHECKED_SHARE", 1.0)
    shop = Shop(tmp_path.name, monkeypatch)
    for label in range(2):
        for k in range(4):
            shop.write(f"class{label}/{k}.png", picture())
    remote_images(shop, tmp_path / "store")
    shop.write("class0/0.png", picture())
    shop.write("class1/new.png", picture())
    warned = CollectedWarnings()
    second = remote_images(shop, tmp_path / "store", warned)
    assert second.manifest.reused is None
    assert any("differs from what is made of its original now" in text for text in warned.warnings)
    assert_same(second, remote_images(shop, tmp_path / "nothing"))
