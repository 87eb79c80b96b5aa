"""Labels of an evaluation's samples."""

import numpy as np
import pytest

from edt_core.diffusion.noise import LABEL_DRAW, sample_noise
from edt_core.errors import UserError
from edt_core.sampling.labels import LabelPolicy, sample_labels

POLICIES: list[LabelPolicy] = ["balanced", "uniform", "prior"]
COUNTS = [5, 0, 1, 4]


@pytest.mark.parametrize("policy", POLICIES)
def test_classes_without_images_are_never_drawn(policy: LabelPolicy) -> None:
    assert set(sample_labels(policy, 0, range(60), 4, COUNTS).tolist()) == {0, 2, 3}
    assert set(sample_labels(policy, 0, range(60), 4, [1] * 4).tolist()) == {0, 1, 2, 3}


def test_classes_in_turn_leave_out_those_without_images() -> None:
    assert sample_labels("balanced", 9, range(7), 4, COUNTS).tolist() == [0, 2, 3, 0, 2, 3, 0]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_label_is_a_function_of_seed_and_index(policy: LabelPolicy) -> None:
    whole = sample_labels(policy, 3, range(40), 4, COUNTS)
    assert whole.dtype == np.int64
    assert whole.shape == (40,)
    for part in ([7], [39, 0, 12], list(range(20, 30))):
        assert np.array_equal(sample_labels(policy, 3, part, 4, COUNTS), whole[part])
    assert len(sample_labels(policy, 3, [], 4, COUNTS)) == 0


def test_balanced_takes_classes_in_turn() -> None:
    assert sample_labels("balanced", 9, range(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("policy", "shares"), [("uniform", [1 / 3, 0.0, 1 / 3, 1 / 3]), ("prior", [0.5, 0.0, 0.1, 0.4])]
)
def test_drawn_labels_have_their_shares(policy: LabelPolicy, shares: list[float]) -> None:
    drawn = np.bincount(sample_labels(policy, 0, range(4000), 4, COUNTS), minlength=4)
    expected = 4000 * np.array(shares)
    assert np.all(drawn[expected == 0] == 0)
    chi_square = np.sum((drawn - expected)[expected > 0] ** 2 / expected[expected > 0])
    assert chi_square < 16.3  # a thousandth of all draws of three degrees of freedom lie above


def test_seeds_draw_other_labels() -> None:
    one, other = (sample_labels("uniform", seed, range(100), 1000) for seed in (0, 1))
    assert np.mean(one == other) < 0.1


def test_drawn_labels_are_fixed_for_good() -> None:
    """Reported metrics hang on these values."""
    assert sample_labels("uniform", 0, range(5), 1000).tolist() == [949, 178, 909, 257, 988]


def test_no_noise_shares_the_generator_of_a_label() -> None:
    with pytest.raises(ValueError, match="draw below"):
        sample_noise(0, [0], (2,), LABEL_DRAW)


@pytest.mark.parametrize("edge", [0, 3])
def test_a_class_without_images_is_never_drawn(edge: int) -> None:
    counts = np.zeros(4, dtype=np.int64)
    counts[edge] = 1
    assert set(sample_labels("prior", 1, range(200), 4, counts).tolist()) == {edge}


def test_a_prior_needs_counts() -> None:
    with pytest.raises(UserError, match=r"no class counts.*balanced or uniform"):
        sample_labels("prior", 0, range(3), 4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("counts", "message"),
    [([1, 2], "2 class counts for 4 classes"), ([0] * 4, "not all 0"), ([1, 1, 1, -1], "-1")],
)
def test_counts_that_do_not_fit_are_refused(policy: LabelPolicy, counts: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_labels(policy, 0, range(3), 4, counts)


def test_what_makes_no_label_is_refused() -> None:
    with pytest.raises(UserError, match="unknown label policy 'random'"):
        sample_labels("random", 0, [0], 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="indices from -1"):
        sample_labels("uniform", 0, [2, -1], 4)
