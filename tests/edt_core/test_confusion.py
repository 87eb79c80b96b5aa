"""Counts of pairs of classes, accuracies and their intervals: against figures worked out by hand and by search."""

import math

import numpy as np
import pytest

from edt_core.evaluation.confusion import Accuracy, Confusion

LABELS = np.array([0, 0, 0, 0, 2, 2, 3])
PREDICTIONS = np.array([0, 0, 2, 1, 2, 2, 0])


def test_every_image_is_counted_once_in_the_pair_of_its_classes() -> None:
    found = Confusion.of(LABELS, PREDICTIONS, 4)
    assert found.matrix().tolist() == [[2, 1, 1, 0], [0, 0, 0, 0], [0, 0, 2, 0], [1, 0, 0, 0]]
    assert found.overall() == Accuracy(7, 4)
    assert found.by_class() == [Accuracy(4, 2), Accuracy(0, 0), Accuracy(2, 2), Accuracy(1, 0)]
    assert found.mean_over_classes() == pytest.approx((0.5 + 1 + 0) / 3)
    assert found.mistakes(0, 3) == [(1, 1), (2, 1)]
    assert found.mistakes(0, 1) == [(1, 1)]
    assert found.mistakes(2, 3) == []


def test_counts_of_many_classes_take_the_room_of_the_pairs_that_occur() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 1000, (2, 5000))
    found = Confusion.of(labels, predictions, 1000)
    assert len(found.counts) <= 5000
    assert found.counts.sum() == 5000
    again = Confusion.from_arrays(found.arrays(), 1000)
    expected = np.zeros((1000, 1000), int)
    np.add.at(expected, (labels, predictions), 1)
    assert np.array_equal(again.matrix(), expected)
    assert [a.images for a in again.by_class()] == np.bincount(labels, minlength=1000).tolist()


def test_order_does_not_matter() -> None:
    order = np.random.default_rng(1).permutation(len(LABELS))
    one, two = Confusion.of(LABELS, PREDICTIONS, 4), Confusion.of(LABELS[order], PREDICTIONS[order], 4)
    assert {k: v.tolist() for k, v in one.arrays().items()} == {k: v.tolist() for k, v in two.arrays().items()}


def test_nothing_has_no_accuracy() -> None:
    none = Confusion.of(np.array([], np.int64), np.array([], np.int64), 2)
    assert none.overall().value is None
    assert none.mean_over_classes() is None
    assert none.overall().interval(0.95) == (0.0, 1.0)


def test_what_is_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the labels 0..4 are not all among 4 classes"):
        Confusion.of(np.array([0, 4]), np.array([0, 0]), 4)
    with pytest.raises(ValueError, match=r"the predictions -1..0 are not all among 4 classes"):
        Confusion.of(np.array([0, 3]), np.array([0, -1]), 4)
    with pytest.raises(ValueError, match="are not of the same images"):
        Confusion.of(np.array([0, 3]), np.array([0]), 4)


@pytest.mark.parametrize(("right", "images"), [(0, 10), (1, 10), (5, 10), (9, 10), (10, 10), (823, 1000)])
def test_the_interval_is_wilsons(right: int, images: int) -> None:
    """Its ends are where the observed share lies z standard errors off, of the share that the end states."""
    low, high = Accuracy(images, right).interval(0.95)
    share, z = right / images, 1.959964
    for end, exact in ((low, right == 0), (high, right == images)):
        if exact:
            assert end == share
        else:
            assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / images), rel=1e-5)
    assert 0 <= low <= share <= high <= 1
    wide, narrow = Accuracy(images, right).interval(0.99), Accuracy(images, right).interval(0.5)
    assert wide[0] <= low <= narrow[0] <= narrow[1] <= high <= wide[1]
