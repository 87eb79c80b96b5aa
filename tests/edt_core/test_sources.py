"""Image folders as a source: what is listed, what is refused, slices, and what the images are identified by."""

import errno
import os
import pickle
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from edt_core.config import SourceConfig
from edt_core.data.sources import (
    UNREADABLE,
    Listing,
    combine_identity,
    detect_kind,
    image_digest,
    list_source,
    source_identity,
)
from edt_core.data.sources.files import shown
from edt_core.data.sources.places import expand_braces, locate
from edt_core.data.sources.walk import in_threads_if_slow
from edt_core.errors import UserError
from edt_core.progress import Silent


class Told(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.updates: list[tuple[int, int, str]] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def update(self, done: int, total: int, note: str = "", part: int | None = None) -> None:
        self.updates.append((done, total, note))


def listed(path: Path | str, **options: Any) -> Listing:
    return list_source(SourceConfig(path=str(path), **options))


def write(root: Path, *names: str | bytes) -> Path:
    """Files whose content is their name."""
    for name in map(os.fsencode, names):
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(name)
    return root


def names(listing: Listing) -> list[str]:
    return [image.name for image in listing.images()]


def test_photos_are_listed_in_order_with_their_bytes(photos: Path) -> None:
    listing = listed(photos)
    paths = sorted(photos.glob("*/*.JPEG"))
    assert listing.classes == tuple(path.parent.name for path in paths)
    images = list(listing.images())
    assert [image.name for image in images] == [path.relative_to(photos).as_posix() for path in paths]
    assert [image.label for image in images] == list(range(len(paths)))
    assert all(image.data == path.read_bytes() for image, path in zip(images[::25], paths[::25], strict=True))
    assert listing.table["size"].to_pylist() == [path.stat().st_size for path in paths]


def test_images_are_found_at_any_depth_and_other_files_left_out(tmp_path: Path) -> None:
    write(
        tmp_path, "b/deep/er/1.PNG", "b/0.jpg", "a/1.webp", "a/.2.webp", "a/.DS_Store", "a/t.txt", ".c/1.png", "0.png"
    )
    told = Told()
    listing = list_source(SourceConfig(path=str(tmp_path)), told)
    assert listing.classes == ("a", "b")
    assert names(listing) == ["a/1.webp", "b/0.jpg", "b/deep/er/1.PNG"]
    assert [warning for warning in told.warnings if warning.startswith("1 images directly in")]


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "real/1.png", "src/a/1.png")
    os.symlink(tmp_path / "real", tmp_path / "src" / "b")
    os.symlink(tmp_path / "real" / "1.png", tmp_path / "src" / "a" / "2.png")
    os.symlink(tmp_path / "nowhere", tmp_path / "src" / "a" / "3.png")
    images = list(listed(tmp_path / "src").images())
    assert [image.name for image in images] == ["a/1.png", "a/2.png", "a/3.png", "b/1.png"]
    assert images[1].data == images[3].data == b"real/1.png"
    assert images[2].error == "FileNotFoundError: No such file or directory"


@pytest.mark.parametrize("up", [".", "..", "../.."])
def test_a_link_to_a_folder_that_it_lies_in_is_refused(tmp_path: Path, up: str) -> None:
    write(tmp_path, "a/b/1.png", "c/2.png")
    link = tmp_path / "a" / "b" / "loop"
    link.symlink_to(up)
    with pytest.raises(UserError, match="a loop of symbolic links") as caught:
        listed(tmp_path)
    assert f"{link} -> {up} leads to {(link.parent / up).resolve()}" in str(caught.value)


def test_folders_that_link_to_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "c/2.png")
    (tmp_path / "a" / "c").symlink_to("../c")
    (tmp_path / "c" / "a").symlink_to("../a")
    with pytest.raises(UserError, match=r"a loop of symbolic links in the source: .* -> \.\./[ac] "):
        listed(tmp_path)


def test_a_link_that_leads_to_itself_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "c/2.png")
    (tmp_path / "a" / "self").symlink_to("self")
    with pytest.raises(UserError, match="a/self -> self leads back to itself; remove the link") as caught:
        listed(tmp_path)
    assert "permissions" not in str(caught.value)


def test_one_folder_may_be_linked_to_from_several_places(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.png")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "more").symlink_to(tmp_path / "elsewhere")
    assert names(listed(tmp_path / "images")) == ["a/more/1.png", "b/more/1.png"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, b"a/\xff.png", b"b\xe4/1.png", "b\u00e4/\u65e5\u672c.png")
    listing = listed(tmp_path)
    assert names(listing) == ["a/\\xff.png", "b\u00e4/\u65e5\u672c.png", "b\\xe4/1.png"]
    assert listing.classes == ("a", "b\u00e4", "b\\xe4")
    assert all(image.data for image in pickle.loads(pickle.dumps(listing)).images())
    assert len(source_identity(listing)) == 64


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images in .*0 other files"),
        (["a/readme.txt", "b/notes.md"], "no images in .*2 other files"),
        (["only/1.png", "only/2.png"], "only one class .*'only', 2 images.*at least 2"),
        (["1.png", "2.png"], "2 images are directly in .*labels.csv"),
        (["movie.mp4"], "no images in .*1 other files.*'movie.mp4'"),
        (["train.tar.gz"], "train.tar.gz is compressed"),
    ],
)
def test_folders_that_cannot_be_trained_on(tmp_path: Path, files: list[str], message: str) -> None:
    write(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("nowhere-{0..3}.tar", "4 of them match nothing: 'nowhere-0.tar', 'nowhere-1.tar'"),
        ("no/where/*.tar", "does not exist"),
        ("labels.csv", "is neither .tar nor .parquet"),
        ("x.tgz", "compressed"),
        ("pipe:cat x.tar", "is a command"),
    ],
)
def test_paths_that_are_no_source(tmp_path: Path, path: str, message: str) -> None:
    write(tmp_path, "labels.csv", "x.tgz", "a.txt")
    with pytest.raises(UserError, match=message):
        listed(path if path.startswith("pipe:") else tmp_path / path)


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made up, because the tests may run as root, who may read everything."""
    listing = listed(write(tmp_path, "a/1.png", "a/2.png", "b/c/1.png"))

    def open_or_refuse(path: bytes, mode: str) -> Any:
        if path.endswith(b"a/2.png"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open(path, mode)

    monkeypatch.setattr("edt_core.data.sources.reading.open", open_or_refuse, raising=False)
    images = list(listing.images())
    assert [image.error for image in images] == [None, "PermissionError: Permission denied", None]
    scandir = os.scandir

    def scan_or_refuse(path: bytes) -> Any:
        if path.endswith(b"b/c"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", scan_or_refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*b/c: Permission denied; correct"):
        listed(tmp_path)


def test_a_file_that_vanishes_is_an_error_of_its_image(tmp_path: Path) -> None:
    listing = listed(write(tmp_path, "a/1.png", "a/2.png", "b/1.png"))
    (tmp_path / "a" / "2.png").unlink()
    images = list(listing.images())
    assert [image.data is None for image in images] == [False, True, False]
    assert str(tmp_path) not in str(images[1].error)
    digests = [image_digest(image) for image in images]
    assert digests[1] == UNREADABLE
    identity = combine_identity(listing.classes, listing.table["name"].to_pylist(), [0, 0, 1], digests)
    assert identity == source_identity(listing)


def test_other_faults_are_raised(tmp_path: Path) -> None:
    listing = listed(write(tmp_path, "a/1.png", "b/1.png"))
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "a" / "1.png").mkdir()
    with pytest.raises(IsADirectoryError):
        list(listing.images())


def test_the_identity_is_of_content_alone(photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in sorted(photos.glob("*/*.JPEG"))[:12]:
        (copy / path.parent.name).mkdir(parents=True)
        shutil.copy(path, copy / path.parent.name)
    before = source_identity(listed(copy))
    shutil.copytree(copy, tmp_path / "other")
    assert source_identity(listed(tmp_path / "other")) == before
    first = next(copy.glob("*/*.JPEG"))
    os.utime(first, (1, 1))
    assert source_identity(listed(copy)) == before
    data = bytearray(first.read_bytes())
    data[-1] ^= 1  # same path, same size, same date
    first.write_bytes(data)
    os.utime(first, (1, 1))
    assert source_identity(listed(copy)) != before


def test_the_identity_takes_in_classes_names_and_labels() -> None:
    digest = bytes(32)
    base = combine_identity(("a", "b"), ["x", "y"], [0, 1], digest * 2)
    assert base == combine_identity(("a", "b"), [b"x", b"y"], [0, 1], [digest, digest])
    others = {
        combine_identity(("a", "c"), ["x", "y"], [0, 1], digest * 2),
        combine_identity(("a", "b", ""), ["x", "y"], [0, 1], digest * 2),
        combine_identity(("a", "b"), ["x", "z"], [0, 1], digest * 2),
        combine_identity(("a", "b"), ["x", "y"], [1, 0], digest * 2),
        combine_identity(("a", "b"), ["x", "y"], [0, 1], digest + UNREADABLE),
    }
    assert len(others - {base}) == 5
    with pytest.raises(ValueError, match="zip"):
        combine_identity(("a", "b"), ["x", "y"], [0, 1], digest)


def test_progress_of_a_long_digest(tmp_path: Path) -> None:
    told = Told()
    source_identity(listed(write(tmp_path, *(f"{k % 2}/{k}.png" for k in range(300)))), told)
    assert told.updates == [(256, 300, "images digested"), (300, 300, "images digested")]


def test_classes_are_chosen_by_name_and_numbered_in_the_order_of_all(tmp_path: Path) -> None:
    write(tmp_path, *(f"{label}/{k}.png" for label in ("cat", "dog", "emu", "fox") for k in range(5)))
    listing = listed(tmp_path, classes=("fox", "dog"))
    assert listing.classes == ("dog", "fox")
    assert listing.table["label"].to_pylist() == [0] * 5 + [1] * 5
    assert names(listing)[5] == "fox/0.png"
    with pytest.raises(UserError, match=r"names 'dgo', .*'dog'"):
        listed(tmp_path, classes=("dgo", "cat"))
    with pytest.raises(UserError, match="no such class among its 4; it has 'cat', 'dog', 'emu', 'fox'"):
        listed(tmp_path, classes=("zzz", "cat"))
    with pytest.raises(UserError, match="only one class"):
        listed(tmp_path, classes=("cat",))


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"\('train', 'val'\) are splits of a data set, not classes; give .*/train"):
        list_source(SourceConfig(path=str(tmp_path)))
    assert list_source(SourceConfig(path=str(tmp_path / "train"))).classes == ("a", "b")


def test_a_limit_that_leaves_one_class_is_refused(digits_folder: Path) -> None:
    with pytest.raises(UserError, match="only one class"):
        list_source(SourceConfig(path=str(digits_folder), limit=1))


@pytest.mark.parametrize("limit", [3, 7, 10, 11])
def test_a_limit_takes_images_at_even_distances(tmp_path: Path, limit: int) -> None:
    every = names(listed(write(tmp_path, *(f"{k % 2}/{k}.png" for k in range(10)))))
    few = listed(tmp_path, limit=limit)
    assert few.classes == ("0", "1")
    assert names(few) == ([every[i * 10 // limit] for i in range(limit)] if limit < 10 else every)


@pytest.mark.parametrize("access", ["file", "range", "parquet"])
def test_a_slice_pickles_small(tmp_path: Path, access: Any) -> None:
    rows = 50_000
    columns: dict[str, Any] = {
        "name": pa.array([b"class/%08d.png" % k for k in range(rows)]),
        "label": pa.array([k % 2 for k in range(rows)], pa.int32()),
        "size": pa.array(range(rows), pa.int64()),
    }
    if access != "file":
        columns["file"] = pa.array([b"file-%03d" % (k // 100) for k in range(rows)]).dictionary_encode()
        columns["offset"] = pa.array(range(rows), pa.int64())
    listing = Listing(locate(str(tmp_path)).root, ("a", "b"), pa.table(columns), access)
    part = listing.slice(20_000, 20_100)
    assert len(pickle.dumps(part)) < 100 * 60 + 2000
    copy = pickle.loads(pickle.dumps(part))
    assert copy.table["name"].to_pylist() == columns["name"][20_000:20_100].to_pylist()
    assert len(listing.slice(49_990, 60_000)) == 10
    assert len(listing.slice(60_000, 70_000)) == 0
    assert list(listing.slice(5, 5).images()) == []


def test_reading_may_stop_early(photos: Path) -> None:
    images = listed(photos).images()
    assert next(images).data
    images.close()


def test_layouts_are_told_apart(tmp_path: Path) -> None:
    cases = {
        "image_folder": ["a/1.png", "b/1.png"],
        "labels": ["a/1.png", "labels.csv"],
        "webdataset": ["x/s-0.tar", "x/s-1.tar"],
        "parquet": ["deep/er/data-0.parquet"],
        "ilsvrc2012": ["n01440764.tar", "n01440765.tar"],
    }
    for kind, files in cases.items():
        assert detect_kind(locate(str(write(tmp_path / kind, *files)))) == kind
    assert detect_kind(locate(str(tmp_path / "webdataset")), labels="x.csv") == "labels"
    assert detect_kind(locate(str(tmp_path / "webdataset" / "x" / "s-{0..1}.tar"))) == "webdataset"
    assert detect_kind(locate(str(tmp_path / "parquet" / "deep" / "**" / "*.parquet"))) == "parquet"


def test_braces_and_credentials() -> None:
    assert expand_braces("a-{08..10}.{x,y}") == ["a-08.x", "a-08.y", "a-09.x", "a-09.y", "a-10.x", "a-10.y"]
    assert shown("at https://me:pw/@host/x?sig=1 and more?") == "at https://host/x and more?"


def test_folders_of_a_slow_disk_are_listed_in_threads_and_in_order() -> None:
    names = [b"%d" % number for number in range(20)]
    threads = set()

    def listed(name: bytes, waits: float) -> bytes:
        threads.add(threading.get_ident())
        time.sleep(waits)
        return name

    assert [*in_threads_if_slow(partial(listed, waits=0.06), names)] == names
    assert len(threads) > 1
    threads.clear()
    assert [*in_threads_if_slow(partial(listed, waits=0.0), names)] == names
    assert threads == {threading.get_ident()}
