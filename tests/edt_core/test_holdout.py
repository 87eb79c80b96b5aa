"""Held-out images: which they are, what a training is without them, and what their loss says about overfitting."""

import hashlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from edt_core.config import TrainConfig, recorded_fields, result_fields
from edt_core.data.holdout import (
    LEAST_HELD_OUT,
    MOST_MEASURED,
    check_holdout,
    choose_held_out,
    expected_held_out,
    holdout_problem,
)
from edt_core.data.latents import LatentDataset
from edt_core.data.loader import BatchPlan, latent_batches
from edt_core.errors import UserError
from edt_core.training.validation.overfitting import Overfitting, overfitting


def digests_of(*names: int) -> NDArray[np.uint8]:
    """The sha256 of some contents, uint8 [n, 32]."""
    data = b"".join(hashlib.sha256(str(name).encode()).digest() for name in names)
    return np.frombuffer(data, np.uint8).reshape(-1, 32)


def held(names: range | list[int], share: float) -> set[int]:
    """The contents that are held out."""
    return {list(names)[row] for row in choose_held_out(digests_of(*names), share).rows.tolist()}


# --- which images


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_is_held_out_by_the_digest_alone(share: float) -> None:
    names = list(range(4000))
    first = held(names, share)
    assert len(first) == pytest.approx(share * 4000, rel=0.1)
    fractions = {n: int(hashlib.sha256(str(n).encode()).hexdigest()[:16], 16) / 2**64 for n in names}
    assert first == {n for n in names if fractions[n] < share}
    assert held(names[::-1], share) == first


def test_images_that_come_or_go_move_no_other() -> None:
    before, after = held(range(2000), 0.1), held(range(500, 4000), 0.1)
    stayed = set(range(500, 2000))
    assert before & stayed == after & stayed
    assert held(range(2000), 0.05) < held(range(2000), 0.2)


def test_a_larger_share_of_few_images_is_at_least_64_and_growing_only_gives_images_back() -> None:
    few, more, many = held(range(200), 0.01), held(range(1000), 0.01), held(range(20_000), 0.01)
    assert len(few) == len(more) == LEAST_HELD_OUT < len(many)
    assert not (more & set(range(200))) - few  # nothing that was trained on is held out later
    assert not (many & set(range(1000))) - more


def test_copies_of_a_file_are_on_one_side() -> None:
    names = [*range(1000), *range(1000)]
    rows = choose_held_out(digests_of(*names), 0.2).rows
    assert np.array_equal(rows[rows < 1000], rows[rows >= 1000] - 1000)
    copies = [*range(100), *[k for k in range(100) for _ in range(2)]]  # also at the limit of 64
    sides = held(copies, 0.01)
    chosen = choose_held_out(digests_of(*copies), 0.01)
    assert len(chosen.rows) == sum(copies.count(name) for name in sides) >= LEAST_HELD_OUT


def test_the_measured_images_are_those_of_lowest_digest_in_its_order() -> None:
    digests = digests_of(*range(4000))
    holdout = choose_held_out(digests, 0.5)
    assert len(holdout.measured) == MOST_MEASURED < len(holdout.rows)
    texts = [bytes(row) for row in holdout.digests]
    assert texts == sorted(bytes(row) for row in digests)[:MOST_MEASURED]
    assert np.array_equal(digests[holdout.measured], holdout.digests)
    assert set(holdout.measured) <= set(holdout.rows)
    turned = choose_held_out(digests[::-1], 0.5)
    assert np.array_equal(turned.digests, holdout.digests)


def test_training_rows_are_all_others_in_order() -> None:
    holdout = choose_held_out(digests_of(*range(500)), 0.3)
    rows = holdout.training_rows(500)
    assert np.array_equal(np.sort([*rows, *holdout.rows]), np.arange(500))
    assert (np.diff(rows) > 0).all()


# --- what is refused


@pytest.mark.parametrize(
    ("share", "images", "batch", "says"),
    [
        (0.1, 127, 8, "more than half of the 127; set train.holdout=0, or use at least 128 images"),
        (0.5, 400, 256, "of 400 images it leaves 200 for the training, fewer than a batch of 256"),
        (0.01, 130, 100, "of 130 images it leaves 66 for the training, fewer than a batch of 100"),
    ],
)
def test_a_holdout_that_leaves_too_little_is_refused_with_numbers_and_a_remedy(
    share: float, images: int, batch: int, says: str
) -> None:
    held_out = expected_held_out(share, images)
    with pytest.raises(UserError, match=r"train\.holdout") as error:
        check_holdout(share, held_out, images, batch)
    assert says in str(error.value)


def test_a_holdout_that_leaves_enough_is_not() -> None:
    assert holdout_problem(0.5, 64, 128, 64) == ""
    assert holdout_problem(0, 0, 3, 64) == ""  # without one, a batch may have an image twice


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"holdout": 1.5}, "holdout is 1.5; it must be the share of the images"),
        ({"holdout": -0.1}, "holdout is -0.1; it must be"),
        ({"holdout": True}, "holdout is True; it must be"),
        ({"holdout": "some"}, "holdout is 'some'; it must be"),
        ({"holdout": 0.1, "reader": "webdataset"}, "reader is webdataset, which reads no single rows; set holdout=0"),
        ({"validate_every": 0}, "greater than or equal to 1"),
    ],
)
def test_a_value_that_is_none_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match="1 validation error") as error:
        TrainConfig(**fields)
    assert says in str(error.value)


# --- fingerprints


def test_by_default_one_percent_of_many_images_and_none_of_few_are_held_out() -> None:
    assert TrainConfig().settled(9_999).holdout_share == 0
    assert TrainConfig().settled(10_000).holdout_share == 0.01
    assert TrainConfig(reader="webdataset").settled(10_000).holdout_share == 0
    assert TrainConfig(max_steps=0).settled(10_000).holdout_share == 0
    assert TrainConfig(holdout=0.2).settled(300).holdout_share == 0.2
    assert TrainConfig(holdout=0).settled(10_000).holdout_share == 0
    assert TrainConfig().settled(None) == TrainConfig()


def test_a_training_that_holds_out_nothing_has_the_fields_of_versions_before() -> None:
    before = set(result_fields(TrainConfig()))
    assert not before & {"holdout", "validate_every"}
    for config in (TrainConfig().settled(400), TrainConfig(holdout=0).settled(20_000), TrainConfig(holdout=0)):
        assert set(result_fields(config)) == before
    assert set(result_fields(TrainConfig(validate_every=7).settled(400))) == before
    many = result_fields(TrainConfig().settled(20_000))
    assert many == {**result_fields(TrainConfig()), "holdout": 0.01}
    assert result_fields(TrainConfig(holdout=0.01).settled(400))["holdout"] == 0.01
    assert result_fields(TrainConfig(validate_every=7).settled(20_000))["validate_every"] == 7


def test_a_record_has_what_was_asked_for() -> None:
    assert "holdout" not in recorded_fields(TrainConfig())
    assert recorded_fields(TrainConfig(holdout=0))["holdout"] == 0


# --- a part of a data set


def test_a_part_has_its_rows_and_no_others(dataset: LatentDataset) -> None:
    rows = np.array([3, 17, 18, 95, 40])
    part = dataset.part(rows)
    indices, mirror = np.array([4, 0, 4, 2]), np.array([True, False, False, True])
    found, expected = part.gather(indices, mirror), dataset.gather(rows[indices], mirror)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert (len(part), len(dataset)) == (5, 96)
    assert np.array_equal(part.labels, dataset.labels[rows])
    assert np.array_equal(part.part(np.array([1, 3])).origin(np.arange(2)), [17, 95])
    with pytest.raises(IndexError, match="of 5"):
        part.gather(np.array([5]), np.array([False]))


def test_batches_of_a_part_name_the_rows_of_the_shards(dataset: LatentDataset) -> None:
    rows = np.arange(1, 96, 2)
    batches = latent_batches(dataset.part(rows), BatchPlan(0, 16, 0.0))
    seen = np.concatenate([next(batches).indices for _ in range(3)])
    assert np.array_equal(np.sort(seen), rows)  # an epoch


# --- overfitting


def curve(*losses: float, every: int = 100) -> list[dict[str, float]]:
    """A history with a row of the training between two measurements."""
    rows: list[dict[str, float]] = []
    for number, loss in enumerate(losses, start=1):
        rows += [{"step": number * every - 50.0, "loss": 1.0}, {"step": float(number * every), "holdout_loss": loss}]
    return rows


def test_a_loss_that_rose_three_times_and_by_more_than_one_percent_is_overfitting() -> None:
    found = overfitting(curve(0.5, 0.4, 0.3, 0.31, 0.32, 0.33))
    assert found == Overfitting(300, pytest.approx(0.1))
    text = "The held-out loss was lowest at step 300 and has risen by 10 % since: the model is overfitting"
    assert text in str(found)


@pytest.mark.parametrize(
    "losses",
    [
        (0.5, 0.4, 0.3, 0.2),
        (0.5, 0.4, 0.3, 0.35, 0.36),  # two rises
        (0.3, 0.31, 0.32, 0.33, 0.329),  # it falls again
        (0.3, 0.3005, 0.301, 0.3015),  # within 1 %
        (0.3, 0.4, 0.4, 0.5),  # equal once
        (0.3, 0.4, 0.5),
        (),
    ],
)
def test_another_curve_is_not(losses: tuple[float, ...]) -> None:
    assert overfitting(curve(*losses)) is None
    assert overfitting([{"step": 1.0, "loss": 1.0}]) is None
