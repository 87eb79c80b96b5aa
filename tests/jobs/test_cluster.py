"""Pools on a full cluster, and errors as their job raised them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edt_core.errors import UserError
from jobs.runtime.cluster import cause_of, require
from jobs.runtime.pool import pooled

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class Squares:
    """A worker that notes each time it is loaded."""

    def __init__(self, notes: str, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        with open(notes, "a") as file:
            file.write("loaded\n")

    def work(self, item: int) -> int:
        time.sleep(self.pause_s)
        if item == 13:
            raise UserError("13 cannot be squared")
        return item * item


class DiesOnce(Squares):
    """A worker whose process is lost once, in the middle of its work."""

    def __init__(self, notes: str) -> None:
        super().__init__(notes)
        self.notes = Path(notes)

    def work(self, item: int) -> int:
        if item == 3 and len(self.notes.read_text().splitlines()) == 1:
            os._exit(1)
        return item * item


def test_every_item_is_done_once_and_workers_load_once(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    assert dict(pooled(Squares, 2, range(9), str(notes), num_cpus=0)) == {i: i * i for i in range(9)}
    assert 1 <= len(notes.read_text().splitlines()) <= 2


def test_pools_that_share_a_full_cluster_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Two pools that want every CPU each: with one actor of each placed, both finish."""
    import ray

    every = int(ray.cluster_resources()["CPU"])

    def drain(name: str) -> int:
        return sum(result for _, result in pooled(Squares, every, range(4), str(tmp_path / name), 0.2, num_cpus=1))

    drains = [ray.remote(drain).options(num_cpus=0).remote(name) for name in "ab"]
    assert ray.get(drains, timeout=600) == [14, 14]


def test_an_error_of_a_worker_reaches_the_caller_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        list(pooled(Squares, 2, range(10, 16), str(tmp_path / "notes"), num_cpus=0))
    assert str(cause_of(raised.value)) == "13 cannot be squared"


@pytest.mark.faults
def test_a_lost_worker_is_started_again_and_its_item_done_again(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    assert dict(pooled(DiesOnce, 1, range(6), str(notes), num_cpus=0)) == {i: i * i for i in range(6)}
    assert len(notes.read_text().splitlines()) == 2


def test_what_this_machine_can_never_give_is_refused() -> None:
    require("train", CPU=1)
    with pytest.raises(UserError, match=r"train needs 4096 CPU at once, but this machine offers \d+"):
        require("train", CPU=4096)
    with pytest.raises(UserError, match="encode needs 1 GPU"):
        require("encode", CPU=1, GPU=1)


def causes() -> Iterator[tuple[BaseException, type[BaseException]]]:
    try:
        raise UserError("mine") from OSError("below")
    except UserError as error:
        yield error, UserError
    try:
        raise RuntimeError("wrapper") from UserError("mine")
    except RuntimeError as error:
        yield error, UserError
    yield KeyError("own"), KeyError


@pytest.mark.parametrize(("error", "kind"), causes())
def test_the_cause_is_what_the_job_raised(error: BaseException, kind: type[BaseException]) -> None:
    assert type(cause_of(error)) is kind
