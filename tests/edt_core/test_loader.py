"""The loader: each epoch a permutation, the same batches at any world size and depth, resume equals uninterrupted."""

import gc
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.data.loader import LatentBatch, LatentLoader, latent_batches, require_finite
from edt_core.data.order import epoch_order
from edt_core.data.prefetch import prefetched
from edt_core.data.scale import LatentScale
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
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
    gc.collect()
    assert threads() == []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "edt-prefetch"]


def take(dataset: LatentDataset, steps: int, **options: object) -> list[LatentBatch]:
    with LatentLoader(dataset, **{**OPTIONS, **options}) as loader:
        return list(islice(loader, steps))


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
def test_a_resumed_loader_equals_an_uninterrupted_one(dataset: LatentDataset, stop: int) -> None:
    whole = take(dataset, 60)
    with LatentLoader(dataset, **OPTIONS) as first:
        list(islice(first, stop))
        time.sleep(0.01)  # the thread runs ahead of what was handed out, which the state must not count
        state = first.state_dict()
    assert (state["step"], state["epoch"]) == (stop, stop * 24 // TOTAL)
    with LatentLoader(dataset, **OPTIONS) as second:
        next(second)  # and a loader that has begun elsewhere goes where the state says
        second.load_state_dict(state)
        assert all(same(a, b) for a, b in zip(islice(second, 60 - stop), whole[stop:], strict=True))


def test_a_resumed_loader_may_have_another_world_size(dataset: LatentDataset) -> None:
    with LatentLoader(dataset, **OPTIONS, rank=0, world_size=2) as loader:
        list(islice(loader, 5))
        state = loader.state_dict()
    with LatentLoader(dataset, **OPTIONS) as alone:
        alone.load_state_dict(state)
        assert same(next(alone), take(dataset, 6)[5])


def test_iterating_goes_on_after_close(dataset: LatentDataset) -> None:
    with LatentLoader(dataset, **OPTIONS) as loader:
        begun = list(islice(loader, 3))
        loader.close()
        assert threads() == []
        begun += islice(loader, 3)
    assert all(same(a, b) for a, b in zip(begun, take(dataset, 6), strict=True))


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 4), ("global_batch_size", 12), ("num_samples", 9), ("version", 0)]
)
def test_a_state_of_another_order_is_refused(dataset: LatentDataset, name: str, value: int) -> None:
    with LatentLoader(dataset, **OPTIONS) as loader:
        state = loader.state_dict()
        with pytest.raises(UserError, match=f"{name} {value} instead of {state[name]}"):
            loader.load_state_dict({**state, name: value})


def test_a_batch_with_less_than_a_sample_for_each_worker_is_refused(dataset: LatentDataset) -> None:
    with pytest.raises(UserError, match="24 samples has not one for each of 25 workers; use fewer workers"):
        LatentLoader(dataset, **OPTIONS, world_size=25)


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


def test_a_loader_that_is_dropped_ends_its_thread(dataset: LatentDataset) -> None:
    loader = LatentLoader(dataset, **OPTIONS)
    next(loader)
    assert len(threads()) == 1
    del loader
    gc.collect()
    assert threads() == []


class _Failing(LatentDataset):
    def gather(self, indices, mirror, out=None):
        raise OSError("the disk is gone")


def test_an_error_in_the_thread_does_not_end_the_data_in_silence(paths: list[Path]) -> None:
    loader = LatentLoader(_Failing(paths), **OPTIONS)
    for _ in range(2):  # asked again, it fails again
        with pytest.raises(OSError, match="the disk is gone"):
            next(loader)


def test_batches_are_their_consumer_s(dataset: LatentDataset) -> None:
    """A batch keeps its values while later ones are made."""
    batches = list(islice(latent_batches(dataset, LatentLoader(dataset, **OPTIONS).plan), 20))
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
        "from edt_core.data.loader import LatentLoader\n"
        "loader = LatentLoader(LatentDataset([Path(p) for p in sys.argv[1:]]), seed=0, global_batch_size=8,"
        " mirror_prob=0.5)\n"
        "print(next(loader).step)"
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
    with LatentLoader(dataset, seed=0, global_batch_size=8, mirror_prob=0.5) as loader:
        views, copies, places = [], [], set()
        for batch in islice(loader, 40):
            if batch.step % 4 == 0:
                views.append(batch.posterior[:, 0])
                copies.append(views[-1].clone())
            places.add(batch.posterior.data_ptr())
            del batch
        assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))
        assert len(places) < 20
