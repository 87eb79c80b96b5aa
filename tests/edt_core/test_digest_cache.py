"""Digests of a source that are remembered: what is untouched is not read, and no change goes unnoticed."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edt_core.config import SourceConfig
from edt_core.data.sources import Listing, digest_cache, file_digests, list_source, source_digests, source_identity
from edt_core.data.sources.digest_cache import cache_path, load, open_cache, save
from edt_core.data.tables import MappedTable, arrow_file, sorting
from edt_core.progress import Silent
from tests.support import sources
from tests.support.sources import WNIDS


class Told(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.read = 0

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def update(self, done: int, total: int, note: str = "", part: int | None = None) -> None:
        self.read = total if note == "images digested" else self.read


def listed(root: Path, **fields: object) -> Listing:
    return list_source(SourceConfig.model_validate({"path": str(root), **fields}))


def identity(root: Path, again: bool = False, **fields: object) -> tuple[str, Told]:
    told = Told()
    return source_identity(listed(root, **fields), told, again), told


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; files count as settled at once: no test waits two seconds for each of its files."""
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "_SETTLED_NS", 0)
    return tmp_path / "cache"


def settle() -> None:
    """Wait for the next tick of the file system's clock."""
    time.sleep(0.02)


def test_a_file_that_nobody_touched_is_looked_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle()
    first, _ = identity(root)
    listing = listed(root)

    def look(*args: object) -> None:
        raise AssertionError("the listing has the files' times already")

    monkeypatch.setattr(digest_cache, "stats_of", look)
    assert source_identity(listing) == first


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for label in ("ant", "bee", "cat"):
        (root / label).mkdir(parents=True)
        for k in range(4):
            (root / label / f"{k}.png").write_bytes(f"{label} {k} ".encode() * 20)
    (tmp_path / "one.png").write_bytes(b"1" * 120)
    (tmp_path / "two.png").write_bytes(b"2" * 120)
    (root / "cat" / "link.png").symlink_to(tmp_path / "one.png")
    os.link(root / "ant" / "0.png", root / "cat" / "hard.png")
    settle()
    return root


def test_an_untouched_folder_is_not_read(root: Path) -> None:
    first, told = identity(root)
    assert told.read == 14
    again, told = identity(root)
    assert (again, told.read, told.warnings) == (first, 0, [])
    forced, told = identity(root, again=True)
    assert (forced, told.read) == (first, 14)


def restored(path: Path, change: Callable[[Path], object]) -> None:
    """A change after which the time of modification is set back."""
    about = path.stat()
    change(path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def flipped(path: Path) -> None:
    with path.open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))


def over(target: Path, data: bytes, keep_time: bool = False) -> None:
    """Another file, moved over a name, perhaps with the old one's time of modification."""
    new = target.parent / ".new"
    new.write_bytes(data)
    if keep_time:
        about = target.stat()
        os.utime(new, ns=(about.st_atime_ns, about.st_mtime_ns))
    new.replace(target)


def swapped(one: Path, other: Path) -> None:
    one.rename(one.parent / ".third")
    other.rename(one)
    (one.parent / ".third").rename(other)


def same_size(path: Path) -> bytes:
    return b"?" * path.stat().st_size


def copied_tree(root: Path) -> None:
    shutil.copytree(root, root.parent / "copy", symlinks=True)
    flipped(root.parent / "copy" / "ant" / "1.png")
    shutil.rmtree(root)
    (root.parent / "copy").rename(root)


def relinked(root: Path, target: Path) -> None:
    (root / "cat" / "link.png").unlink()
    (root / "cat" / "link.png").symlink_to(target)


def mapped(path: Path) -> None:
    import mmap

    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[0] = view[0] ^ 1
        view.flush()


# How a source changes, and whether its identity does.
CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "in place": (lambda r: flipped(r / "ant/1.png"), True),
    "in place, time set back": (lambda r: restored(r / "ant/1.png", flipped), True),
    "in place by a map, time set back": (lambda r: restored(r / "ant/1.png", mapped), True),
    "truncated": (lambda r: os.truncate(r / "ant/1.png", 5), True),
    "truncated, time set back": (lambda r: restored(r / "ant/1.png", lambda p: os.truncate(p, 5)), True),
    "emptied": (lambda r: os.truncate(r / "ant/1.png", 0), True),
    "appended": (lambda r: (r / "ant/1.png").open("ab").write(b"x"), True),
    "appended, time set back": (lambda r: restored(r / "ant/1.png", lambda p: p.open("ab").write(b"x")), True),
    "renamed over": (lambda r: over(r / "ant/1.png", same_size(r / "ant/1.png")), True),
    "renamed over, old time": (lambda r: over(r / "ant/1.png", same_size(r / "ant/1.png"), True), True),
    "same bytes renamed over": (lambda r: over(r / "ant/1.png", (r / "ant/1.png").read_bytes()), False),
    "touched": (lambda r: os.utime(r / "ant/1.png"), False),
    "permissions": (lambda r: (r / "ant/1.png").chmod(0o600), False),
    "hard link replaced": (lambda r: over(r / "cat/hard.png", same_size(r / "cat/hard.png"), True), True),
    "written through a hard link": (lambda r: restored(r / "cat/hard.png", flipped), True),
    "link to another file": (lambda r: relinked(r, r.parent / "two.png"), True),
    "link's target written to": (lambda r: restored(r.parent / "one.png", flipped), True),
    "link made a file": (lambda r: over(r / "cat/link.png", b"1" * 120), False),
    "names swapped": (lambda r: swapped(r / "ant/1.png", r / "ant/2.png"), True),
    "moved to another class": (lambda r: (r / "ant/1.png").rename(r / "bee/new.png"), True),
    "class renamed": (lambda r: (r / "ant").rename(r / "ape"), True),
    "classes swapped": (lambda r: swapped(r / "ant", r / "bee"), True),
    "removed": (lambda r: (r / "ant/1.png").unlink(), True),
    "added": (lambda r: (r / "ant/new.png").write_bytes(b"new"), True),
    "removed and written again": (
        lambda r: (data := same_size(r / "ant/1.png"), (r / "ant/1.png").unlink(), (r / "ant/1.png").write_bytes(data)),
        True,
    ),
    "another tree in its place": (copied_tree, True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_noticed(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, differs = CHANGES[name]
    before, _ = identity(root)
    assert identity(root)[1].read == 0
    change(root)
    after, told = identity(root)
    with monkeypatch.context() as patch:
        patch.setenv("EDT_CACHE_DIR", str(root.parent / "another"))
        assert after == identity(root)[0], "the identity is what it is from nothing"
    assert (after != before) is differs
    assert (told.read > 0) is (name not in ("removed", "class renamed", "classes swapped"))
    assert identity(root)[1].read == 0


def test_what_was_written_within_two_seconds_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "_SETTLED_NS", 2_000_000_000)
    assert identity(root)[1].read == 14
    assert identity(root)[1].read == 14
    time.sleep(2.1)
    assert identity(root)[1].read == 14
    assert identity(root)[1].read == 0


def test_a_file_that_changes_while_it_is_read_is_not_remembered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edt_core.data.sources import listing as module

    plain = module.image_digest

    def digest(image: object) -> bytes:
        found = plain(image)  # type: ignore[arg-type]
        if getattr(image, "name", "") == "bee/2.png":
            flipped(root / "bee" / "2.png")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, "image_digest", digest)
        identity(root)
    settle()
    after, told = identity(root)
    assert told.read == 1
    assert after == identity(root, again=True)[0]


def test_another_choice_of_classes_keeps_what_is_known(root: Path) -> None:
    identity(root)
    assert identity(root, classes=("ant", "bee"))[1].read == 0
    flipped(root / "ant" / "0.png")  # which cat/hard.png is too
    settle()
    assert identity(root, classes=("ant", "bee"))[1].read == 1
    assert identity(root)[1].read == 1, "the other classes are still known; another name of a file is read"
    shutil.rmtree(root / "cat")
    (root / "ant" / "9.png").write_bytes(b"9")
    settle()
    identity(root)
    names = load(cache_path(root, "file"), root, "file").names.to_pylist()
    assert len(names) == 9
    assert not [name for name in names if name.startswith(b"cat/")], "what is gone is forgotten"


def test_a_file_that_cannot_be_read_is_never_remembered(root: Path) -> None:
    (root / "cat" / "nowhere.png").symlink_to(root / "none")
    identity(root)
    assert identity(root)[1].read == 1


def test_a_cache_in_another_order_is_used(root: Path) -> None:
    """Earlier versions wrote new files after those that they knew."""
    first, _ = identity(root)
    path = cache_path(root, "file")
    rows = open_cache(path, root, "file", print)
    names = rows.table["name"].to_pylist()
    assert names == sorted(names)
    backwards = rows.table.take(list(range(len(rows)))[::-1]).combine_chunks()
    save(path, root, "file", lambda: MappedTable(backwards), len(rows), print)
    assert identity(root)[1].read == 0
    (root / "ant" / "00.png").write_bytes(b"new")
    settle()
    after, told = identity(root)
    assert (told.read, after == first) == (1, False)
    assert load(path, root, "file").names.to_pylist() == sorted([*names, b"ant/00.png"])
    assert identity(root)[0] == after == identity(root, again=True)[0]


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_batches_of_any_size_give_the_same(rows: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are added, removed, renamed and changed, at the borders of batches and within them."""
    rng = np.random.default_rng(rows)
    for module in (arrow_file, sorting, file_digests):
        monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(file_digests, "_LOOKED_UP", rows)
    changes: list[Callable[[Path, int], object]] = [
        lambda path, step: path.unlink(),
        lambda path, step: path.rename(path.with_name(f"{step}{path.name}")),
        lambda path, step: flipped(path),
        lambda path, step: path.with_name(f"new-{step}-{path.name}").write_bytes(path.read_bytes()),
        lambda path, step: path.rename(path.parent.parent / "bee" / path.name),
    ]
    for step in range(8):
        paths = sorted(root.glob("*/*.png"))
        for place in rng.choice(len(paths), 3, replace=False):
            changes[rng.integers(len(changes))](paths[place], step)
        settle()
        known = identity(root, allow_empty_classes=True)[0]
        assert known == identity(root, again=True, allow_empty_classes=True)[0]
        names = load(cache_path(root, "file"), root, "file").names.to_pylist()
        assert names == sorted(os.fsencode(path.relative_to(root)) for path in root.glob("*/*.png"))


@pytest.mark.parametrize("damage", ["cut", "byte", "text", "folder", "of another source", "unwritable"])
def test_a_cache_that_cannot_be_used_is_left(damage: str, root: Path, cache: Path) -> None:
    first, _ = identity(root)
    path = cache_path(root, "file")
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "byte":
        at = data.index(source_digests(listed(root))[3].tobytes())
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif damage == "text":
        path.write_bytes(b"{}")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "of another source":
        other = root.parent / "other"
        shutil.copytree(root, other, symlinks=True)
        settle()
        identity(other)
        cache_path(other, "file").replace(path)
    else:
        shutil.rmtree(cache)
        cache.write_bytes(b"")
    again, told = identity(root)
    assert (again, told.read) == (first, 14)
    assert len(told.warnings) >= 1
    assert any(word in told.warnings[-1] for word in ("are not used", "cannot be remembered"))
    if damage not in ("folder", "unwritable"):
        assert identity(root)[1].read == 0, "it is written again"


IMAGES = [
    (f"{wnid}/{wnid}_{k}.JPEG", label, f"{label} {k}".encode())
    for label, wnid in enumerate(WNIDS.values())
    for k in range(6)
]


@pytest.mark.parametrize("layout", [sources.shards, sources.folder_of_class_tars, sources.parquet_folder])
def test_archives_are_known_as_a_whole(
    layout: Callable[[sources.Images], tuple[dict[str, bytes], str]], tmp_path: Path
) -> None:
    root = tmp_path / "archives"
    files, _ = layout(IMAGES)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    settle()
    first, told = identity(root)
    assert told.read == 18
    assert identity(root)[1].read == 0
    assert identity(root)[0] == first == identity(root, again=True)[0]
    assert identity(root, limit=7)[1].read == 0
    archive = next(path for path in sorted(root.rglob("*")) if path.suffix in (".tar", ".parquet"))
    data = archive.read_bytes()
    at = data.index(IMAGES[0][2])
    restored(archive, lambda path: path.write_bytes(data[:at] + b"9" + data[at + 1 :]))
    settle()
    changed, told = identity(root)
    assert changed != first
    assert 0 < told.read < 18
    assert np.array_equal(source_digests(listed(root)), source_digests(listed(root), again=True))


def test_a_part_of_an_archive_is_read_with_the_rest_of_it(tmp_path: Path) -> None:
    root = tmp_path / "archives"
    for name, data in sources.parquet_folder(IMAGES)[0].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    settle()
    assert identity(root, limit=9)[1].read == 9
    first, told = identity(root)
    assert told.read == 18
    assert first == identity(root, again=True)[0]
