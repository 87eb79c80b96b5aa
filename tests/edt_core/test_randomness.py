"""Random numbers of a training, and shares of ranks, as pure functions."""

import numpy as np
import pytest
import torch

from edt_core.data.randomness import (
    ROWS_PER_CHUNK,
    batch_indices,
    epoch_order,
    generator,
    mirror_draws,
    normal_rows,
    uniform_rows,
)
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


def drawn(stream: str, rows: slice, *shape: int, normal: bool = True) -> torch.Tensor:
    fill = normal_rows if normal else uniform_rows
    return fill(torch.empty(rows.stop - rows.start, *shape), rows, 7, 5, stream)


@pytest.mark.parametrize("normal", [True, False])
@pytest.mark.parametrize("shape", [(), (3,), (4, 4, 4)])
def test_a_row_s_numbers_do_not_depend_on_the_rows_beside_it(shape: tuple[int, ...], normal: bool) -> None:
    whole = drawn("noise", slice(0, 70), *shape, normal=normal)
    for start, stop in [(0, 1), (0, 16), (5, 6), (15, 17), (16, 48), (31, 70), (69, 70), (70, 70)]:
        assert torch.equal(drawn("noise", slice(start, stop), *shape, normal=normal), whole[start:stop])


def test_no_chunk_repeats_another_or_another_stream() -> None:
    chunks = [*drawn("noise", slice(0, 64), 8).split(ROWS_PER_CHUNK)]
    chunks += [drawn(stream, slice(0, 16), 8) for stream in ("masked_noise", "posterior", "masks")]
    for number, chunk in enumerate(chunks):
        assert not any(torch.equal(chunk, other) for other in chunks[:number])


def test_only_the_chunks_of_the_rows_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[tuple[int, ...]] = []
    normal = torch.Tensor.normal_

    def counted(self: torch.Tensor, **options: object) -> torch.Tensor:
        filled.append(tuple(self.shape))
        return normal(self, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    drawn("noise", slice(1000, 1032), 3)  # half a chunk, one, and half of the next
    assert filled == [(16, 3)] * 3


@pytest.mark.parametrize(("stream", "first"), [("noise", [0.778772, 0.264790]), ("masks", [0.930752, 0.115007])])
def test_the_numbers_of_rows_stay_what_they_are(stream: str, first: list[float]) -> None:
    """Recorded, of chunks 0 and 2: a run must be repeatable from its record by later code."""
    numbers = drawn(stream, slice(15, 33), normal=False)[[0, 17]]
    assert numbers.tolist() == pytest.approx(first, abs=1e-6)


def mirrored(seed: int, step: int, rows: slice = slice(0, 64), probability: float = 0.5) -> np.ndarray:
    return mirror_draws(seed, step, rows, probability)


def test_mirror_draws_are_a_function_of_seed_and_step() -> None:
    assert np.array_equal(mirrored(3, 5), mirrored(3, 5))
    assert not np.array_equal(mirrored(3, 5), mirrored(3, 6))
    assert not np.array_equal(mirrored(3, 5), mirrored(4, 5))
    assert np.array_equal(mirrored(3, 5)[20:50], mirrored(3, 5, slice(20, 50)))


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 64)])
def test_mirror_images_can_be_left_out(probability: float, expected: int) -> None:
    assert mirrored(3, 0, probability=probability).sum() == expected
