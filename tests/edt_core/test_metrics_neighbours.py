"""Nearest neighbours: what an exhaustive search finds, in any portions, and never oneself."""

import numpy as np
import pytest

from edt_core.errors import UserError
from edt_core.evaluation.metrics import nearest_neighbours

RNG = np.random.default_rng(0)
CANDIDATES = RNG.normal(size=(57, 5)).astype(np.float32)
QUERIES = RNG.normal(size=(9, 5)).astype(np.float32)


def blocks(size: int) -> list[np.ndarray]:
    return [CANDIDATES[k : k + size] for k in range(0, len(CANDIDATES), size)]


@pytest.mark.parametrize("size", [1, 2, 10, 57])  # below and above k, and with a short last block
def test_the_same_as_a_search_through_all(size: int) -> None:
    found = nearest_neighbours(QUERIES, blocks(size), 3)
    distances = np.linalg.norm(QUERIES[:, None].astype(np.float64) - CANDIDATES[None], axis=2)
    np.testing.assert_array_equal(found.rows, distances.argsort(axis=1)[:, :3])
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :3], rtol=1e-9)


def test_a_copy_is_at_no_distance_and_nobody_is_their_own_neighbour() -> None:
    rows = np.array([50, 3, 20])
    copies = nearest_neighbours(CANDIDATES[rows], blocks(10), 2)
    np.testing.assert_array_equal(copies.rows[:, 0], rows)
    assert not copies.distances[:, 0].any()
    others = nearest_neighbours(CANDIDATES[rows], blocks(10), 1, own_rows=rows)
    np.testing.assert_array_equal(others.rows[:, 0], copies.rows[:, 1])
    np.testing.assert_array_equal(others.distances[:, 0], copies.distances[:, 1])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="5 dimensions, but the reference features have 4"):
        nearest_neighbours(QUERIES, [CANDIDATES[:, :4]], 1)
    with pytest.raises(UserError, match="NaN or infinity"):
        nearest_neighbours(QUERIES, [np.full_like(CANDIDATES, np.nan)], 1)
    with pytest.raises(ValueError, match="3 neighbours"):
        nearest_neighbours(QUERIES, [CANDIDATES[:2]], 3)
    with pytest.raises(ValueError, match="1 neighbours"):
        nearest_neighbours(QUERIES[:1], [CANDIDATES[:1]], 1, own_rows=[0])
