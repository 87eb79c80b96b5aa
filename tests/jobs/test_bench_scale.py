"""The simulation of large clusters runs the code of a run, and what it counts is what that code does."""

from pathlib import Path

import pytest

from edt_core.store.cache import Cache
from jobs.benchmark import scale
from jobs.benchmark.planning import CLASSES, measure, synthetic_files


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "BLOCK", 2)


def test_an_epoch_on_one_node_fetches_each_shard_once_and_keeps_two_blocks(tmp_path: Path) -> None:
    played = scale.play(tmp_path, 40 * scale.ROWS + 7, workers=8)
    assert (played.shards, played.nodes, played.fetches, played.twice) == (41, 1, 41, 0)
    most = 8 * 2 * 2 * scale.ROWS * scale.ROW_BYTES  # two blocks of two shards of 8 canonical nodes
    assert most / 2 < played.disk <= most
    assert played.per_node == 41


def test_nodes_divide_the_shards_among_them(tmp_path: Path) -> None:
    played = scale.play(tmp_path, 50 * scale.ROWS, workers=64)
    assert played.nodes == 8
    assert 50 <= played.fetches <= 50 + 7  # a shard at the border of two nodes is fetched by both
    assert played.twice == 0
    assert played.per_node <= 50 / 8 + 2
    assert played.disk <= 2 * 2 * scale.ROWS * scale.ROW_BYTES


def test_a_cache_without_room_for_two_blocks_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted as fetched twice would be, with a cache that keeps nothing."""
    view = Cache.view

    def forgetful(self: Cache, *arguments: object) -> Path:
        for path in self.root.glob("objects/*/*"):
            path.unlink()
        return view(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Cache, "view", forgetful)
    assert scale.play(tmp_path, 30 * scale.ROWS + 7, workers=8).twice > 0


def test_synthetic_files_are_listed_and_planned(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / "classes" / f"n{k:08d}").mkdir(parents=True)
    with synthetic_files(5 * CLASSES):
        assert measure(tmp_path / "classes").shards == 1
    with pytest.raises(Exception, match="no images"):
        measure(tmp_path / "classes")
