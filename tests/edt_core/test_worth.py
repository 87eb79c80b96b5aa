"""What metrics are worth: against chance, real images, and the noise of the measurement."""

import numpy as np
import pytest

from edt_core.evaluation.confusion import Accuracy
from edt_core.evaluation.worth import ACCURACY, Measured, chance, difference, noise, remarks

REAL = Accuracy(180, 160)


def texts(after: Measured, before: dict[str, float] | None, real: Accuracy | None = REAL) -> list[tuple[str, bool]]:
    found = remarks(after, before, "fd_classifier", True, by_chance=0.1, real=real)
    return [(remark.text, remark.doubt) for remark in found]


def test_an_accuracy_at_chance_and_a_distance_of_nearly_the_untrained_one_are_no_success() -> None:
    after = Measured({ACCURACY: 0.119, "fd_classifier": 46.7}, samples=400)
    assert texts(after, {ACCURACY: 0.1, "fd_classifier": 47.5}) == [
        (
            "accuracy_classifier is 0.119 (chance 0.1, 0.889 for real images it was not fitted on): the samples do not "
            "show the requested classes, as by chance",
            True,
        ),
        (
            "fd_classifier is 46.7, that of the untrained model 47.5: nearly the same, and one set of samples does not "
            "show the noise (sample.repeats=3 does)",
            True,
        ),
    ]


def test_a_good_model_is_measured_against_chance_and_real_images_without_doubt() -> None:
    after = Measured({ACCURACY: 0.71, "fd_classifier": 4.9}, samples=400)
    assert texts(after, {ACCURACY: 0.1, "fd_classifier": 47.5}) == [
        ("accuracy_classifier is 0.71 (chance 0.1, 0.889 for real images it was not fitted on)", False)
    ]
    assert texts(after, None, real=None) == [("accuracy_classifier is 0.71 (chance 0.1)", False)]


def test_repeats_show_the_noise_of_a_distance() -> None:
    before = {"fd_classifier": 47.5, "fd_classifier_std": 0.3}
    near = Measured({"fd_classifier": 46.7, "fd_classifier_std": 0.5}, samples=100, repeats=3)
    far = Measured({"fd_classifier": 46.4, "fd_classifier_std": 0.5}, samples=100, repeats=3)
    assert texts(near, before) == [
        ("fd_classifier is 46.7, that of the untrained model 47.5: no more than the noise of 3 repeats (1)", True)
    ]
    assert texts(far, before) == []
    worse = Measured({"fd_classifier": 60.0, "fd_classifier_std": 0.5}, samples=100, repeats=3)
    assert texts(worse, before) == [
        ("fd_classifier is 60, that of the untrained model 47.5: training made it worse", True)
    ]


def test_a_classifier_at_chance_is_no_measure() -> None:
    after = Measured({ACCURACY: 0.9}, samples=400)
    ((_, first), (text, doubt)) = texts(after, None, Accuracy(40, 5))
    assert (first, doubt) == (False, True)
    assert "metrics in its feature space say little" in text


@pytest.mark.parametrize(
    ("policy", "counts", "expected"),
    [
        ("balanced", None, 0.25),
        ("balanced", [5, 0, 9, 6], 1 / 3),
        ("uniform", [1, 1, 1, 1], 0.25),
        ("prior", [5, 0, 9, 6], 0.45),
    ],
)
def test_chance_is_that_of_the_requested_classes(policy: str, counts: list[int] | None, expected: float) -> None:
    assert chance(policy, 4, counts) == pytest.approx(expected)


def test_a_share_of_equal_models_differs_by_more_than_its_noise_in_about_one_of_twenty_measurements() -> None:
    drawn = np.random.default_rng(0).binomial(200, 0.3, size=(4000, 2)) / 200
    clear = [
        difference("precision_x", {"precision_x": a}, Measured({"precision_x": b}, 200)) == "clear" for a, b in drawn
    ]
    assert 0.03 < np.mean(clear) < 0.065
    assert noise("fd_x", {"fd_x": 1.0}, Measured({"fd_x": 2.0}, 200)) is None
    assert difference("fd_x", {"fd_x": 1.0}, Measured({"fd_x": 2.0}, 200)) == "clear"
    assert (
        difference(
            "inception_score",
            {"inception_score": 5.0, "inception_score_std": 9.0},
            Measured({"inception_score": 6.0, "inception_score_std": 9.0}, 200),
        )
        == "clear"
    )  # over parts


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_not_called_nearly_the_same(value: float) -> None:
    measured = Measured({"fd_classifier": value}, samples=400)
    assert texts(measured, {"fd_classifier": 47.5}) == [
        (f"fd_classifier is {value}: the samples cannot be judged by it", True)
    ]
    assert texts(Measured({"fd_classifier": 4.5}, samples=400), {"fd_classifier": value}) == []  # no measure of it
