"""Random numbers of a training, and shares of ranks, as pure functions."""

import numpy as np
import pytest
import torch

from edt_core.data.randomness import batch_indices, epoch_order, generator, mirror_draws
from edt_core.data.subsets import share


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


def test_shares_are_even_cuts_in_order_of_rank() -> None:
    for total in range(30):
        for world_size in range(1, 12):
            cuts = [share(total, rank, world_size) for rank in range(world_size)]
            assert [place for cut in cuts for place in range(cut.start, cut.stop)] == list(range(total))
            sizes = [cut.stop - cut.start for cut in cuts]
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= min(1, total // world_size)


@pytest.mark.parametrize(
    ("stream", "first"),
    [
        ("mirror", 0.852792),
        ("posterior", 0.902652),
        ("labels", 0.907951),
        ("timesteps", 0.375320),
        ("noise", 0.443391),
        ("masks", 0.986135),
    ],
)
def test_the_streams_stay_where_they_are(stream: str, first: float) -> None:
    """Recorded: a run must be repeatable from its record by later code."""
    assert float(torch.rand(1, generator=generator(7, 5, stream))) == pytest.approx(first, abs=1e-6)


def test_mirror_draws_are_a_function_of_seed_and_step() -> None:
    assert np.array_equal(mirror_draws(3, 5, 64, 0.5), mirror_draws(3, 5, 64, 0.5))
    assert not np.array_equal(mirror_draws(3, 5, 64, 0.5), mirror_draws(3, 6, 64, 0.5))
    assert not np.array_equal(mirror_draws(3, 5, 64, 0.5), mirror_draws(4, 5, 64, 0.5))


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 64)])
def test_mirror_images_can_be_left_out(probability: float, expected: int) -> None:
    assert mirror_draws(3, 0, 64, probability).sum() == expected
