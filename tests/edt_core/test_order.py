"""The order of training data as a pure function."""

import numpy as np
import pytest

from edt_core.data.order import batch_indices, epoch_order


@pytest.mark.parametrize("num_samples", [1, 2, 97, 1000])
def test_every_epoch_is_a_permutation(num_samples: int) -> None:
    for epoch in range(3):
        assert np.array_equal(np.sort(epoch_order(7, epoch, num_samples)), np.arange(num_samples))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = epoch_order(1, 0, 500).copy()
    epoch_order.cache_clear()
    assert np.array_equal(first, epoch_order(1, 0, 500))
    assert not np.array_equal(first, epoch_order(1, 1, 500))
    assert not np.array_equal(first, epoch_order(2, 0, 500))


@pytest.mark.parametrize(("batch", "num_samples"), [(8, 64), (8, 30), (32, 30), (100, 30)])
def test_batches_lay_the_epochs_end_to_end(batch: int, num_samples: int) -> None:
    steps = -(-3 * num_samples // batch)
    sequence = np.concatenate([batch_indices(0, step, batch, num_samples) for step in range(steps)])
    for epoch in range(3):
        here = sequence[epoch * num_samples : (epoch + 1) * num_samples]
        assert np.array_equal(here, epoch_order(0, epoch, num_samples))
