"""Batches of equal keys, in order of arrival, filled while the device is busy."""

import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pytest

from jobs.serve.batching import Batcher


class Device:
    """Doubles numbers once it may start, and fails for negative ones."""

    def __init__(self) -> None:
        self.batches: list[tuple[Hashable, list[int]]] = []
        self.started, self.may_run = threading.Event(), threading.Event()

    def run(self, key: Hashable, values: Sequence[int]) -> list[int]:
        self.started.set()
        assert self.may_run.wait(60)
        self.batches.append((key, list(values)))
        if min(values) < 0:
            raise ValueError("negative")
        return [2 * value for value in values]


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def batcher(device: Device) -> Iterator[Any]:
    batcher = Batcher[int, int](device.run, size=4)
    yield batcher
    device.may_run.set()
    batcher.close()


def test_what_arrives_while_the_device_is_busy_shares_batches_of_equal_key(device: Device, batcher: Any) -> None:
    futures = batcher.submit("a", [0])
    assert device.started.wait(60)
    for key, values in (("a", [1, 2]), ("b", [10]), ("a", [3, 4, 5]), ("b", [11])):
        futures += batcher.submit(key, values)
    device.may_run.set()
    assert [future.result(60) for future in futures] == [0, 2, 4, 20, 6, 8, 10, 22]
    assert device.batches == [("a", [0]), ("a", [1, 2, 3, 4]), ("b", [10, 11]), ("a", [5])]


def test_an_error_goes_to_the_value_that_causes_it(device: Device, batcher: Any) -> None:
    device.may_run.set()
    futures = batcher.submit("a", [1, -2, 3])
    assert [future.exception(60) is None for future in futures] == [True, False, True]
    assert futures[2].result() == 6


def test_a_cancelled_value_takes_no_place(device: Device, batcher: Any) -> None:
    first = batcher.submit("a", [0])
    assert device.started.wait(60)
    cancelled = batcher.submit("b", [1, 2])
    kept = batcher.submit("a", [3])
    assert all(future.cancel() for future in cancelled)
    device.may_run.set()
    assert first[0].result(60) == 0
    assert kept[0].result(60) == 6
    assert device.batches == [("a", [0]), ("a", [3])]


def test_what_was_submitted_is_finished_when_it_closes(device: Device) -> None:
    batcher = Batcher[int, int](device.run, size=2)
    futures = batcher.submit("a", [1, 2, 3])
    device.may_run.set()
    batcher.close()
    assert [future.result(0) for future in futures] == [2, 4, 6]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit("a", [1])
