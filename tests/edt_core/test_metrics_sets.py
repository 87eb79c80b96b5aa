"""What a comparison makes of what each side has, and what it refuses or warns of."""

from typing import Any

import numpy as np
import pytest

from edt_core.errors import UserError
from edt_core.evaluation.metrics import (
    FeatureSet,
    FeatureStatistics,
    Gaussian,
    bias_warning,
    compute_metrics,
    frechet,
    frechet_distance,
    inception_score,
    metric_name,
    rank_warning,
)

RNG = np.random.default_rng(0)
MADE, REAL = RNG.standard_normal((90, 6)), RNG.standard_normal((80, 6)) + 0.3
MADE_SPATIAL, REAL_SPATIAL = RNG.standard_normal((90, 4)), RNG.standard_normal((80, 4)) + 1.0
PROBABILITIES = RNG.dirichlet(np.ones(5), 90)


def gaussian(features: Any) -> Gaussian:
    return FeatureStatistics.from_features(features).gaussian


def test_all_that_the_sets_can_give_is_computed() -> None:
    generated = FeatureSet(features=MADE, spatial=MADE_SPATIAL, probabilities=PROBABILITIES)
    published = FeatureSet(statistics=gaussian(REAL), spatial_statistics=gaussian(REAL_SPATIAL))
    values = compute_metrics(generated, published, split_size=40)
    score = inception_score(PROBABILITIES, split_size=40)
    assert values == {
        "fid": frechet_distance(gaussian(MADE), gaussian(REAL)),
        "sfid": frechet_distance(gaussian(MADE_SPATIAL), gaussian(REAL_SPATIAL)),
        "inception_score": score.mean,
        "inception_score_std": score.std,
    }
    whole = FeatureSet(features=REAL, spatial=REAL_SPATIAL)
    names = ["fid", "sfid", "inception_score", "inception_score_std", "kid", "precision", "recall"]
    assert list(compute_metrics(generated, whole)) == names
    dinov2 = [f"{name}_dinov2" for name in ("fd", "kid", "precision", "recall")]
    assert list(compute_metrics(generated, whole, space="dinov2")) == dinov2
    assert compute_metrics(MADE.tolist(), whole) == compute_metrics(MADE, REAL)


def test_statistics_of_all_images_go_before_those_of_the_features_kept() -> None:
    kept = FeatureSet(features=REAL[:20], statistics=gaussian(REAL))
    values = compute_metrics(MADE, kept, ("kid", "fid"))
    assert values["fid"] == compute_metrics(MADE, REAL, ("fid",))["fid"]
    assert values["kid"] == compute_metrics(MADE, REAL[:20], ("kid",))["kid"]


@pytest.mark.parametrize(
    ("metric", "space", "message"),
    [
        ("kid", "inception", "kid needs features of the reference side"),
        ("precision", "classifier", "precision needs features of the reference side"),
        (
            "sfid",
            "inception",
            "sfid needs spatial features or spatial statistics of the generated and the reference side",
        ),
        ("inception_score", "inception", "needs class probabilities of the generated side"),
        ("inception_score", "dinov2", "needs outputs of the Inception network, which the space 'dinov2' does not have"),
        ("sfid", "classifier", "the space 'classifier' does not have"),
    ],
)
def test_a_metric_that_cannot_be_had_says_what_is_missing(metric: str, space: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute_metrics(MADE, FeatureSet(statistics=gaussian(REAL)), (metric,), space=space)


def test_sets_that_give_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="no metric can be computed of the two sides: fid needs features or statistics"):
        compute_metrics(FeatureSet(), REAL)
    with pytest.raises(UserError, match="'dinov2' does not have"):
        metric_name("inception_score", "dinov2")


def test_too_few_samples_for_full_rank_are_refused_unless_allowed() -> None:
    few, enough = MADE[:6], MADE[:7]  # 7 samples have 6 independent deviations
    assert compute_metrics(enough, REAL, ("fid",))
    with pytest.raises(
        UserError, match=r"fid of 6 generated samples in 6 dimensions: at least 7 are needed .* use kid"
    ):
        compute_metrics(few, REAL)
    with pytest.raises(UserError, match="fid of 6 reference samples"):
        compute_metrics(REAL, few)
    with pytest.raises(UserError, match="sfid of 4 generated samples in 4 dimensions"):
        compute_metrics(FeatureSet(MADE, spatial=MADE_SPATIAL[:4]), FeatureSet(REAL, spatial=REAL_SPATIAL))
    allowed = compute_metrics(few, REAL, allow_rank_deficient=True)
    assert allowed["fid"] == frechet_distance(gaussian(few), gaussian(REAL))
    unknown = Gaussian(gaussian(few).mean, gaussian(few).covariance)
    assert compute_metrics(REAL, FeatureSet(statistics=unknown), ("fid",))["fid"] == pytest.approx(allowed["fid"])


def test_statistics_of_another_extractor_are_refused() -> None:
    with pytest.raises(UserError, match="generated features have 6 dimensions, but the reference features have 4"):
        compute_metrics(MADE, FeatureSet(statistics=gaussian(REAL_SPATIAL)))


def test_the_side_of_lower_rank_is_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever side it is on; statistics of unknown count may have full rank."""
    factored = []
    honest = frechet.trace_sqrt_product

    def spy(first: Any, second: Any) -> float:
        factored.append(first)
        return honest(first, second)

    monkeypatch.setattr(frechet, "trace_sqrt_product", spy)
    few, many = gaussian(MADE[:4]), Gaussian(gaussian(REAL).mean, gaussian(REAL).covariance)
    forward, backward = frechet_distance(few, many), frechet_distance(many, few)
    assert forward == pytest.approx(backward, rel=1e-9)
    assert all(covariance is few.covariance for covariance in factored)


def test_statistics_come_back_from_arrays_as_they_were() -> None:
    statistics = FeatureStatistics.from_features(MADE)
    again = FeatureStatistics.from_arrays(statistics.to_arrays())
    assert again.count == 90
    assert np.array_equal(again.mean, statistics.mean)
    assert np.array_equal(again.scatter, statistics.scatter)
    assert frechet_distance(again, statistics.gaussian) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scatter": np.eye(5)}, r"mean of shape \(6,\) and a scatter of shape \(5, 5\)"),
        ({"mean": np.full(6, np.nan)}, "6 values of the statistics are NaN or infinity"),
        ({"scatter": np.triu(np.ones((6, 6)))}, "not symmetric: .* by up to 1, and the largest entry is 1"),
        ({"scatter": -np.eye(6)}, "-1 on its diagonal"),
        ({"count": np.array(0)}, "count is 0"),
        ({"count": np.array(2.5)}, "count is 2.5"),
        ({"count": None}, r"lack \['count'\]"),
    ],
)
def test_arrays_that_are_no_statistics_are_refused(change: dict[str, Any], message: str) -> None:
    arrays = {**FeatureStatistics.from_features(MADE).to_arrays(), **change}
    with pytest.raises(UserError, match=message):
        FeatureStatistics.from_arrays({key: value for key, value in arrays.items() if value is not None})


def test_a_gaussian_of_one_sample_or_of_nonsense_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 samples, but there are 1"):
        Gaussian(np.zeros(2), np.eye(2), 1)
    with pytest.raises(UserError, match="not symmetric"):
        Gaussian(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))


def test_small_samples_bias_the_frechet_distance() -> None:
    """Two samples of one distribution: the smaller they are, the further apart the distance says they are."""
    both = np.random.default_rng(1).standard_normal((2, 4000, 16))
    by_number = [compute_metrics(*both[:, :number], ("fid",))["fid"] for number in (100, 1000, 4000)]
    assert by_number[0] > 2 * by_number[1] > 4 * by_number[2] > 0


def test_small_samples_are_warned_of() -> None:
    warning = bias_warning(["fid", "sfid", "kid", "fid_std"], 1000)
    assert warning is not None
    assert warning.startswith("fid, sfid of 1,000 samples are biased upwards")
    assert "use kid too, which is unbiased" in warning
    one = bias_warning(["fd_dinov2", "fd_dinov2_std", "precision_dinov2"], 9_999)
    assert one is not None
    assert one.startswith("fd_dinov2 of 9,999 samples is biased")
    assert "use kid_dinov2" in one
    assert bias_warning(["kid", "precision", "inception_score"], 10) is None
    assert bias_warning(["fid"], 10_000) is None


def test_a_covariance_of_low_rank_is_warned_of() -> None:
    assert rank_warning(None, 2048) is None
    assert rank_warning(2049, 2048) is None
    warning = rank_warning(1000, 2048)
    assert warning is not None
    assert "1,000 samples in 2,048 dimensions" in warning
    assert "rank 999 at most" in warning
