"""The node's cache of remote files: bounded, filled once, never half, never with other bytes."""

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.cache import Cache, local_copy, local_directory, parse_bytes
from edt_core.store.folder import Folder
from tests.support.disk import small_tmpfs

SIZE = 1000
Fetch = Callable[[Folder, str, Path], str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache of ten files of SIZE bytes."""
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EDT_CACHE_BYTES", str(10 * SIZE))
    return tmp_path / "cache"


def remote(name: str, tmp_path: Path, files: range) -> Artifact:
    """An artifact in memory, behind fsspec as an object store is; file k holds the number k."""
    out = ArtifactWriter(Folder.at(f"memory://{tmp_path.name}/{name}"), "images", "0" * 64, "a1")
    for k in files:
        out.write_bytes(f"{k:02d}.bin", bytes([k]) * SIZE)
    return out.commit({}, {}, {})


def kept(cache: Path) -> set[int]:
    """Which files the cache holds."""
    return {path.read_bytes()[0] for path in (cache / "objects").rglob("*") if path.is_file()}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are downloaded, in order."""
    names: list[str] = []
    fetch: Fetch = Folder.fetch

    def counted(self: Folder, name: str, target: Path) -> str:
        names.append(name)
        time.sleep(0.05)
        return fetch(self, name, target)

    monkeypatch.setattr(Folder, "fetch", counted)
    return names


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5000", 5000),
        ("200GB", 200 * 10**9),
        ("200G", 200 * 10**9),
        ("1TiB", 1 << 40),
        (" 1.5 gib ", 3 << 29),
        ("64k", 64000),
        ("10B", 10),
    ],
)
def test_sizes_are_read_with_and_without_units(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "10XB", "GB", "1e9", "0.1"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"EDT_CACHE_BYTES is .*; give a number of bytes, such as 200GB"):
        parse_bytes(text)


def test_the_bound_is_half_of_the_file_system_unless_set(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cache.of_node().bound == 10 * SIZE
    monkeypatch.delenv("EDT_CACHE_BYTES")
    status = os.statvfs(cache)
    assert Cache.of_node().bound == status.f_blocks * status.f_frsize // 2


def test_a_file_is_downloaded_once_for_all_artifacts_that_hold_it(
    cache: Path, tmp_path: Path, fetched: list[str]
) -> None:
    one, two = remote("one", tmp_path, range(4)), remote("two", tmp_path, range(2, 6))
    assert [path.read_bytes()[0] for path in one.paths()] == [0, 1, 2, 3]
    assert [path.read_bytes()[0] for path in two.paths()] == [2, 3, 4, 5]
    assert one.path("00.bin") == one.paths("00*")[0]
    assert sorted(fetched) == [f"{k:02d}.bin" for k in range(6)]


def test_a_download_tells_its_progress(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        def __init__(self) -> None:
            self.updates: list[tuple[int, int]] = []

        def update(self, done: int, total: int, note: str = "", part: int | None = None) -> None:
            self.updates.append((done, total))

        def metrics(self, values: object, step: int) -> None: ...

        def warn(self, message: str) -> None: ...

    monkeypatch.setenv("EDT_CACHE_BYTES", "10MB")
    out = ArtifactWriter(Folder.at(f"memory://{tmp_path.name}/large"), "images", "0" * 64, "a1")
    for k in range(3):
        out.write_bytes(f"{k}.bin", bytes([k]) * (1 << 20))
    told = Told()
    out.commit({}, {}, {}).paths("*", told)
    assert told.updates == [(1, 3), (2, 3), (3, 3)]


def test_what_was_used_longest_ago_makes_room(cache: Path, tmp_path: Path, fetched: list[str]) -> None:
    one, two = remote("one", tmp_path, range(8)), remote("two", tmp_path, range(20, 25))
    one.paths()
    assert kept(cache) == set(range(8))
    one.paths("00*")
    one.paths("03*")
    two.paths()  # five in, three of the eight out
    assert len(kept(cache)) == 10
    assert {0, 3, *range(20, 25)} <= kept(cache)
    fetched.clear()
    assert [path.read_bytes()[0] for path in one.paths()] == list(range(8))
    assert len(fetched) == 3
    assert len(kept(cache)) == 10


def test_what_a_call_needs_is_never_evicted_for_it(cache: Path, tmp_path: Path) -> None:
    one, two = remote("one", tmp_path, range(8)), remote("two", tmp_path, range(10))
    one.paths()
    assert [path.read_bytes()[0] for path in two.paths()] == list(range(10))
    assert kept(cache) == set(range(10))


def test_cached_files_make_room_on_a_disk_that_others_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far below the limit, the disk has less space than a call needs."""

    def artifact(name: str, files: range) -> Artifact:
        out = ArtifactWriter(Folder.at(f"memory://{tmp_path.name}/{name}"), "images", "0" * 64, "a1")
        for k in files:
            out.write_bytes(f"{k}.bin", bytes([k]) * (64 << 10))
        return out.commit({}, {}, {})

    monkeypatch.setenv("EDT_CACHE_BYTES", "1GB")
    with small_tmpfs(tmp_path / "disk", "592k") as disk:
        monkeypatch.setenv("EDT_CACHE_DIR", str(disk / "cache"))
        artifact("one", range(4)).paths()
        (disk / "another").write_bytes(bytes(256 << 10))
        assert [path.read_bytes()[0] for path in artifact("two", range(10, 13)).paths()] == [10, 11, 12]
        assert len(kept(disk / "cache")) == 5
        with pytest.raises(UserError, match=r"cannot write to the cache .*no space is left"):
            artifact("three", range(20, 30)).paths()  # more than the disk has without the other file


def test_a_set_that_the_cache_cannot_hold_is_one_clear_message(cache: Path, tmp_path: Path, fetched: list[str]) -> None:
    artifact = remote("one", tmp_path, range(11))
    with pytest.raises(UserError, match=r"11 files of .* have 11,000 bytes, .* at most 10,000; raise EDT_CACHE_BYTES"):
        artifact.paths()
    with pytest.raises(UserError, match=r"train\.reader=stream"):
        artifact.verify_once()
    assert fetched == []
    assert len(artifact.paths("0*")) == 10


def test_an_evicted_file_that_is_mapped_stays_readable(cache: Path, tmp_path: Path) -> None:
    path = remote("one", tmp_path, range(1)).path("00.bin")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        remote("two", tmp_path, range(1, 11)).paths()
        assert not path.exists()
        assert mapped[:] == bytes(SIZE)


def test_a_cached_file_that_was_written_to_is_downloaded_again(cache: Path, tmp_path: Path) -> None:
    artifact = remote("one", tmp_path, range(2))
    path = artifact.path("01.bin")
    assert path.stat().st_mode & 0o222 == 0
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"x")
    assert artifact.path("01.bin").read_bytes() == b"\1" * SIZE


def test_threads_that_want_one_file_download_it_once(cache: Path, tmp_path: Path, fetched: list[str]) -> None:
    artifact = remote("one", tmp_path, range(3))
    together = threading.Barrier(6)
    found: list[bytes] = []

    def read() -> None:
        together.wait()
        found.extend(path.read_bytes() for path in artifact.paths())

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 18
    assert sorted(fetched) == ["00.bin", "01.bin", "02.bin"]


PROCESS = """
import os, signal, sys, time
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder

uri, log, kill = sys.argv[1:]
fetch = Folder.fetch

def counted(self, name, target):
    with open(log, "a") as file:
        file.write(name + "\\n")
    if kill == "kill":
        target.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return fetch(self, name, target)

Folder.fetch = counted
for path in Artifact.open(uri).paths():
    assert len(path.read_bytes()) == 1000
"""


def process(artifact: Artifact, log: Path, kill: str = "") -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", PROCESS, artifact.folder.uri, str(log), kill])


def on_s3(s3: str, files: range) -> Artifact:
    out = ArtifactWriter(Folder.at(f"{s3}/one"), "images", "0" * 64, "a1")
    for k in files:
        out.write_bytes(f"{k:02d}.bin", bytes([k]) * SIZE)
    return out.commit({}, {}, {})


@pytest.mark.extern
def test_processes_that_want_one_file_download_it_once(s3: str, tmp_path: Path) -> None:
    artifact = on_s3(s3, range(2))
    started = [process(artifact, tmp_path / "log") for _ in range(3)]
    assert [one.wait(600) for one in started] == [0, 0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == ["00.bin", "01.bin"]


@pytest.mark.faults
def test_a_killed_download_leaves_nothing_that_is_trusted_and_is_cleaned_up(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "edt-cache"
    artifact = on_s3(s3, range(2))
    assert process(artifact, tmp_path / "log", "kill").wait(600) == -9
    assert list(cache.rglob("*.part"))
    assert _whole_objects(cache) == []
    remote("other", tmp_path, range(5, 6)).paths()  # another file's download clears it away
    assert not list(cache.rglob("*.part"))
    assert [path.read_bytes()[0] for path in artifact.paths()] == [0, 1]


def _whole_objects(cache: Path) -> list[Path]:
    return [path for path in (cache / "objects").rglob("*") if path.is_file() and path.suffix != ".part"]


def test_a_download_that_fails_keeps_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = remote("one", tmp_path, range(1))

    def full(self: Folder, name: str, target: Path) -> str:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "fetch", full)
        with pytest.raises(UserError, match=r"cannot write to the cache .*no space is left"):
            artifact.paths()
    assert [path for path in (cache / "objects").rglob("*") if path.is_file()] == []
    assert artifact.path("00.bin").read_bytes() == bytes(SIZE)


def test_a_file_that_left_the_store_is_named(cache: Path, tmp_path: Path) -> None:
    artifact = remote("one", tmp_path, range(1))
    artifact.data.remove("00.bin")
    with pytest.raises(ManifestError, match=r"00\.bin is missing"):
        artifact.paths()


def test_files_without_a_digest_are_cached_until_they_change(cache: Path, tmp_path: Path, fetched: list[str]) -> None:
    folder = Folder.at(f"memory://{tmp_path.name}/step-00000001")
    folder.write_bytes("a.json", b"1" * 10)
    folder.write_bytes("sub/b.json", b"2" * 10)
    copy = local_directory(folder)
    assert {p.relative_to(copy).as_posix() for p in copy.rglob("*.json")} == {"a.json", "sub/b.json"}
    assert local_copy(folder, "a.json") == copy / "a.json"
    assert sorted(fetched) == ["a.json", "sub/b.json"]
    folder.write_bytes("a.json", b"3" * 10)
    assert local_copy(folder, "a.json").read_bytes() == b"3" * 10
    assert len(fetched) == 3


def test_an_empty_remote_folder_is_an_empty_local_one(cache: Path, tmp_path: Path) -> None:
    assert list(local_directory(Folder.at(f"memory://{tmp_path.name}/nothing")).iterdir()) == []


def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = remote("one", tmp_path, range(1))
    monkeypatch.setenv("EDT_CACHE_DIR", "/dev/null/edt")
    with pytest.raises(UserError, match="set EDT_CACHE_DIR"):
        artifact.paths()
