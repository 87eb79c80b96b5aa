"""The room of the node's cache: calls at the same time keep its limit together, and few of them look at every file."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.store import room
from edt_core.store.artifact import Artifact
from edt_core.store.cache import Cache
from edt_core.store.folder import Folder
from edt_core.store.room import Room
from tests.edt_core.test_cache import SIZE, kept, remote

FILES = 10


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache of FILES files."""
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EDT_CACHE_BYTES", str(FILES * SIZE))
    monkeypatch.setattr(room, "_WAIT_S", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often all files of the cache are looked at."""
    counts: Counter[str] = Counter()
    look = Room._look

    def counted(self: Room, ledger: room._Ledger) -> None:
        counts["looks"] += 1
        look(self, ledger)

    monkeypatch.setattr(Room, "_look", counted)
    return counts


@pytest.fixture
def most(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """The most files, whole or arriving, that were there while one arrived."""
    numbers, lock, fetch = [0], threading.Lock(), Folder.fetch

    def counted(self: Folder, name: str, target: Path) -> str:
        target.write_bytes(bytes(SIZE))  # as large as it will be
        with lock:
            numbers.append(sum(1 for path in (cache / "objects").rglob("*") if path.is_file()))
        return fetch(self, name, target)

    monkeypatch.setattr(Folder, "fetch", counted)
    return lambda: max(numbers)


def ledger(cache: Path) -> room._Ledger:
    return room._Ledger(**json.loads((cache / "room.json").read_text()))


def node() -> Room:
    cache = Cache.of_node()
    return Room(cache.root, cache.bound, cache._lock)


def read(artifact: Artifact) -> list[int]:
    return [path.read_bytes()[0] for path in artifact.paths()]


def test_a_full_cache_is_not_looked_at_for_each_block(cache: Path, tmp_path: Path, looks: Counter[str]) -> None:
    for block in range(25):
        read(remote(f"block-{block}", tmp_path, range(2 * block, 2 * block + 2)))
        assert ledger(cache).used == len(kept(cache)) * SIZE <= FILES * SIZE
    assert kept(cache) == set(range(40, 50))
    assert looks["looks"] <= 1 + 50 // FILES


def test_a_file_that_was_used_since_the_look_stays(cache: Path, tmp_path: Path, looks: Counter[str]) -> None:
    first = remote("first", tmp_path, range(8))
    first.paths()
    remote("more", tmp_path, range(20, 22)).paths()
    remote("again", tmp_path, range(30, 31)).paths()  # looks, and removes one of the first eight
    oldest = min(kept(cache) & set(range(8)))
    first.paths(f"{oldest:02d}*")
    remote("last", tmp_path, range(40, 43)).paths()
    assert oldest in kept(cache)
    assert looks["looks"] == 2


def test_calls_at_the_same_time_stay_below_the_limit_and_wait_for_each_other(
    cache: Path, tmp_path: Path, most: Callable[[], int]
) -> None:
    """Two of these artifacts do not fit at a time."""
    artifacts = [remote(f"part-{k}", tmp_path, range(6 * k, 6 * k + 6)) for k in range(5)]
    with ThreadPoolExecutor(len(artifacts)) as pool:
        list(pool.map(lambda artifact: artifact.verified_paths(artifact.entries()), artifacts))
    assert 6 <= most() <= FILES
    assert ledger(cache).calls == {}
    assert ledger(cache).used <= FILES * SIZE
    assert not list((cache / "locks" / "calls").iterdir())


def test_files_of_a_call_in_progress_are_not_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = remote("first", tmp_path, range(4))
    files = {path.resolve(): SIZE for path in first.paths()}
    with node().kept(files):
        assert read(remote("second", tmp_path, range(20, 26))) == list(range(20, 26))
        assert read(remote("third", tmp_path, range(30, 36))) == list(range(30, 36))
        assert kept(cache) >= set(range(4))
        monkeypatch.setattr(room, "_WAIT_AT_MOST_S", 0.05)
        with pytest.raises(UserError, match=r"had no room for 7,000 bytes beside the files .* raise EDT_CACHE_BYTES"):
            read(remote("fourth", tmp_path, range(40, 47)))
    assert read(remote("fourth", tmp_path, range(40, 47))) == list(range(40, 47))


def test_calls_of_processes_that_ended_do_not_count(cache: Path, tmp_path: Path, looks: Counter[str]) -> None:
    read(remote("first", tmp_path, range(4)))
    state = ledger(cache)
    state.calls["0" * 32] = {"objects/00/" + "0" * 64: 6 * SIZE}
    state.used += 6 * SIZE
    node()._write(state)
    looks.clear()
    assert read(remote("second", tmp_path, range(20, 26))) == list(range(20, 26))
    assert looks["looks"] == 1
    assert kept(cache) == {*range(4), *range(20, 26)}
    assert ledger(cache).calls == {}


@pytest.mark.parametrize("text", ["", "[]", '{"used": 1}', '{"used": 1, "looked": 0, "calls": {}, "more": 1}'])
def test_a_damaged_ledger_is_written_again(cache: Path, tmp_path: Path, text: str) -> None:
    read(remote("first", tmp_path, range(4)))
    (cache / "room.json").write_text(text)
    read(remote("second", tmp_path, range(20, 23)))
    assert ledger(cache).used == 7 * SIZE


def test_what_a_failed_call_counted_is_counted_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = remote("first", tmp_path, range(4))
    artifact.data.remove("03.bin")
    with pytest.raises(ValueError, match="missing"):
        artifact.paths()
    assert ledger(cache).calls == {}
    read(remote("second", tmp_path, range(20, 22)))
    assert ledger(cache).used == len(kept(cache)) * SIZE


def test_files_that_others_remove_or_add_are_noticed(cache: Path, tmp_path: Path) -> None:
    first = remote("first", tmp_path, range(8))
    for path in first.paths():
        path.resolve().unlink()
    assert read(remote("second", tmp_path, range(20, 29))) == list(range(20, 29))
    assert ledger(cache).used == 9 * SIZE
