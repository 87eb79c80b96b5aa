"""Batches of latents: each epoch a permutation, the same at any world size and depth, resume equals uninterrupted."""

import gc
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.data.loader import BatchPlan, LatentBatch, latent_batches, require_finite
from edt_core.data.prefetch import prefetched
from edt_core.data.randomness import epoch_order
from edt_core.data.scale import LatentScale
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from tests.support.batches import assert_held_batches_stay
from tests.support.processes import wait_for

SIZES = (300, 5, 260)
TOTAL = sum(SIZES)
OPTIONS = {"seed": 3, "global_batch_size": 24, "mirror_prob": 0.5}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shards; row i has label i, and a posterior that tells row and side."""
    folder, paths, start = tmp_path_factory.mktemp("shards"), [], 0
    for k, size in enumerate(SIZES):
        rows = np.arange(start, start + size)
        posterior = np.empty((size, 2, 2, 4, 2, 2), np.float32)
        posterior[:, 0], posterior[:, 1] = rows[:, None, None, None, None], -rows[:, None, None, None, None]
        paths.append(folder / f"{k}.arrow")
        with LatentShardWriter(
            paths[-1], LatentInfo("vae", LatentScale(0.5), 16, (4, 2, 2), f"images-{k}.tar")
        ) as writer:
            writer.write([str(row) for row in rows], rows, posterior)
        start += size
    return paths


@pytest.fixture(scope="module")
def dataset(paths: list[Path]) -> LatentDataset:
    return LatentDataset(paths)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    if threads():  # of batches that are left to the collector, which takes most of a second in a process of the suite
        gc.collect()
    assert threads() == []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "edt-prefetch"]


def loaded(
    dataset: LatentDataset, start_step: int = 0, prefetch: int = 2, **options: int
) -> Generator[LatentBatch, None, None]:
    """Batches as a training takes them, without end."""
    return prefetched(latent_batches(dataset, BatchPlan(**{**OPTIONS, **options}), start_step), prefetch)


def take(dataset: LatentDataset, steps: int, **options: int) -> list[LatentBatch]:
    with closing(loaded(dataset, **options)) as batches:
        return list(islice(batches, steps))


def same(a: LatentBatch, b: LatentBatch) -> bool:
    return (
        a.step == b.step
        and np.array_equal(a.indices, b.indices)
        and np.array_equal(a.mirror, b.mirror)
        and torch.equal(a.posterior, b.posterior)
        and torch.equal(a.labels, b.labels)
    )


def test_a_batch_holds_the_rows_it_names(dataset: LatentDataset) -> None:
    for batch in take(dataset, 30):
        assert torch.equal(batch.labels, torch.from_numpy(batch.indices))
        expected = np.where(batch.mirror, -batch.indices, batch.indices)[:, None]
        assert (batch.posterior.flatten(1).numpy() == expected).all()
        assert batch.posterior.shape == (24, 2, 4, 2, 2)


@pytest.mark.parametrize("size", [24, 7, TOTAL + 100])
def test_every_epoch_takes_every_row_once(dataset: LatentDataset, size: int) -> None:
    rows = np.concatenate([b.indices for b in take(dataset, -(-3 * TOTAL // size), global_batch_size=size)])
    for epoch in range(3):
        here = rows[epoch * TOTAL : (epoch + 1) * TOTAL]
        assert np.array_equal(np.sort(here), np.arange(TOTAL))
        assert np.array_equal(here, epoch_order(OPTIONS["seed"], epoch, TOTAL))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 24])
def test_global_batches_do_not_know_the_world_size(dataset: LatentDataset, world_size: int) -> None:
    whole = take(dataset, 50)
    ranks = [take(dataset, 50, rank=rank, world_size=world_size) for rank in range(world_size)]
    sizes = {len(batch.indices) for batches in ranks for batch in batches}
    assert sizes <= {24 // world_size, 24 // world_size + 1}
    for step, expected in enumerate(whole):
        parts = [batches[step] for batches in ranks]
        joined = LatentBatch(
            step,
            np.concatenate([part.indices for part in parts]),
            np.concatenate([part.mirror for part in parts]),
            torch.cat([part.posterior for part in parts]),
            torch.cat([part.labels for part in parts]),
        )
        assert same(joined, expected)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_the_depth_changes_nothing(dataset: LatentDataset, prefetch: int) -> None:
    deep = take(dataset, 40, prefetch=prefetch)
    assert all(same(a, b) for a, b in zip(deep, take(dataset, 40), strict=True))


@pytest.mark.parametrize("stop", [0, 1, 11, 23, 24, 40])  # an epoch ends within batch 23
@pytest.mark.parametrize("before", [1, 2])
def test_a_resumed_training_s_batches_equal_an_uninterrupted_one_s(
    dataset: LatentDataset, stop: int, before: int
) -> None:
    """Also where another number of workers began it."""
    whole = take(dataset, 60)
    begun = [take(dataset, stop, rank=rank, world_size=before) for rank in range(before)]
    rest = take(dataset, 60 - stop, start_step=stop)
    indices = [np.concatenate([batches[step].indices for batches in begun]) for step in range(stop)]
    assert all(np.array_equal(ours, batch.indices) for ours, batch in zip(indices, whole[:stop], strict=True))
    assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))


def test_a_batch_with_less_than_a_sample_for_each_worker_is_refused() -> None:
    with pytest.raises(UserError, match="has 24 samples, less than the 25 workers; use fewer workers"):
        BatchPlan(**OPTIONS, world_size=25)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("keys", [(), ("a", "b", "c", "d", "e")])
def test_samples_that_are_not_finite_are_named(value: float, keys: tuple[str, ...]) -> None:
    posterior = torch.ones(5, 2, 4, 2, 2)
    batch = LatentBatch(7, np.array([50, 40, 30, 20, 10]), np.zeros(5, bool), posterior, torch.zeros(5), keys)
    require_finite(batch)
    posterior[1, 0, 3, 1, 1] = posterior[4, 1, 0, 0, 0] = value
    names = "keys b, e" if keys else "rows 40, 10"
    with pytest.raises(UserError, match=rf"2 latents of step 7 are not finite \({names}\); encode the images again"):
        require_finite(batch)


def test_finite_latents_pass_though_their_sum_does_not() -> None:
    posterior = torch.full((4, 2, 4, 2, 2), 3e38)
    posterior[2:] *= -1
    require_finite(LatentBatch(0, np.arange(4), np.zeros(4, bool), posterior, torch.zeros(4)))


def test_infinities_that_cancel_are_found() -> None:
    posterior = torch.ones(4, 2, 4, 2, 2)
    posterior[0, 0, 0, 0, 0], posterior[1, 0, 0, 0, 0] = np.inf, -np.inf
    with pytest.raises(UserError, match="rows 0, 1"):
        require_finite(LatentBatch(0, np.arange(4), np.zeros(4, bool), posterior, torch.zeros(4)))


def test_batches_that_are_dropped_end_their_thread(dataset: LatentDataset) -> None:
    batches = loaded(dataset)
    next(batches)
    assert len(threads()) == 1
    del batches
    gc.collect()
    assert threads() == []


class _Failing(LatentDataset):
    def gather(self, indices, mirror, out=None):
        raise OSError("the disk is gone")


def test_an_error_in_the_thread_reaches_the_training(paths: list[Path]) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        next(loaded(_Failing(paths)))


def test_batches_are_their_consumer_s(dataset: LatentDataset) -> None:
    """A batch keeps its values while later ones are made."""
    batches = list(islice(latent_batches(dataset, BatchPlan(**OPTIONS)), 20))
    assert len({batch.posterior.data_ptr() for batch in batches}) == 20


def counting(made: list[int], stop: int = 1 << 30) -> Iterator[int]:
    for number in range(stop):
        made.append(number)
        yield number


def test_no_more_than_depth_items_are_ahead() -> None:
    made: list[int] = []
    items = prefetched(counting(made), 3)
    assert made == []  # nothing before the first next
    for taken in range(1, 6):
        next(items)
        wait_for(lambda taken=taken: len(made) >= taken + 3, pause=0.001)
        time.sleep(0.01)  # in which it could go on, and must not
        assert len(made) == taken + 3
    items.close()


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("number", [0, 1, 9])
def test_prefetching_keeps_items_and_order(depth: int, number: int) -> None:
    assert list(prefetched(range(number), depth)) == list(range(number))


def test_an_error_comes_after_the_items_before_it_with_its_traceback() -> None:
    def producer() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("in the producer")

    items = prefetched(producer(), 5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="in the producer") as caught:
        next(items)
    assert "producer" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_closing_closes_the_producer_too() -> None:
    closed: list[str] = []

    def producer() -> Iterator[int]:
        try:
            yield from range(1 << 30)
        finally:
            closed.append(threading.current_thread().name)

    items = prefetched(producer(), 2)
    next(items)
    items.close()
    assert closed == ["edt-prefetch"]


@pytest.mark.extern
def test_an_interpreter_exits_in_the_middle(paths: list[Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from edt_core.data.latents import LatentDataset\n"
        "from edt_core.data.loader import BatchPlan, latent_batches\n"
        "from edt_core.data.prefetch import prefetched\n"
        "plan = BatchPlan(seed=0, global_batch_size=8, mirror_prob=0.5)\n"
        "batches = prefetched(latent_batches(LatentDataset([Path(p) for p in sys.argv[1:]]), plan), 2)\n"
        "print(next(batches).step)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_batch_that_is_held_is_never_overwritten(latents_artifact: Artifact) -> None:
    """Buffers are used again, but not while the batch, or a view of it, is in use."""
    dataset = LatentDataset(latents_artifact.paths("*.arrow"))
    with closing(loaded(dataset, seed=0, global_batch_size=8)) as batches:
        assert_held_batches_stay(batches)
