"""The metrics against reference values, and what must hold for any features."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edt_core.evaluation.metrics import (
    FEATURE_METRICS,
    METRICS,
    FeatureStatistics,
    Gaussian,
    compute_metrics,
    frechet_distance,
    inception_score,
    kernel_distance,
    metric_name,
    precision_recall,
    space_metrics,
)

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(GOLDEN_DIR / "metrics.npz")
EXPECTED = json.loads((GOLDEN_DIR / "metrics.json").read_text())
GENERATED: NDArray[np.float64] = GOLDEN["features_1"]
REFERENCE: NDArray[np.float64] = GOLDEN["features_2"]
PROBABILITIES: NDArray[np.float64] = GOLDEN["probabilities"]


def frechet(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    return frechet_distance(FeatureStatistics.from_features(first), FeatureStatistics.from_features(second))


@pytest.mark.parametrize("block_size", [100, 2048])
def test_metrics_meet_the_reference(block_size: int) -> None:
    metrics = compute_metrics(GENERATED, REFERENCE, block_size=block_size)
    assert list(metrics) == ["fid", "kid", "precision", "recall"]
    assert metrics["fid"] == pytest.approx(EXPECTED["fid"], rel=1e-9)
    assert metrics["kid"] == pytest.approx(EXPECTED["kid_full_unbiased_mmd2"], rel=1e-9)
    assert metrics["precision"] == EXPECTED["precision_k3"]
    assert metrics["recall"] == EXPECTED["recall_k3"]


def test_frechet_distance_of_rank_deficient_sets_meets_the_reference() -> None:
    expected = EXPECTED["fid_rank_deficient_first40_vs_first50"]
    assert frechet(GENERATED[:40], REFERENCE[:50]) == pytest.approx(expected, rel=1e-6)


def test_inception_score_meets_the_reference() -> None:
    score = inception_score(PROBABILITIES, split_size=200)
    assert score.mean == pytest.approx(EXPECTED["inception_score_split200"], rel=1e-9)


@pytest.mark.parametrize("cuts", [[300], [1, 2, 599], [100, 250, 400, 550]])
def test_merged_statistics_equal_those_of_the_whole(cuts: list[int]) -> None:
    shifted = GENERATED + 1e4  # sums of raw squares would lose half their digits here
    first, *others = (FeatureStatistics.from_features(part) for part in np.split(shifted, cuts))
    for part in others:
        first = first.merge(part)
    assert first.count == len(shifted)
    np.testing.assert_allclose(first.mean, shifted.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(first.covariance, np.cov(shifted, rowvar=False), atol=1e-10)


@pytest.mark.parametrize("samples", [600, 40])
def test_frechet_distance_is_symmetric_and_zero_on_itself(samples: int) -> None:
    generated = GENERATED[:samples]
    assert frechet(generated, REFERENCE) == pytest.approx(frechet(REFERENCE, generated), rel=1e-9)
    assert frechet(generated, generated) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_diagonal_gaussians_is_known() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2, also where one of the sets has no spread at all."""
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)  # unit covariance
    narrow, wide = signs * [1, 2], signs * [3, 5] + [7, 0]
    assert frechet(narrow, wide) == pytest.approx(49 + 4 + 9)
    assert frechet(narrow, np.full((4, 2), 1.0)) == pytest.approx(2 + 1 + 4)
    assert frechet(np.zeros((4, 2)), np.zeros((4, 2))) == 0


@pytest.mark.parametrize("weakest", [1.0, 1e-6, 1e-12, 1e-15, 0.0])
def test_frechet_distance_of_nearly_flat_gaussians_is_known(weakest: float) -> None:
    """A covariance C against 4 C is tr(C) apart, however close to a null space C comes, and whichever is factored."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    covariance = axes * np.geomspace(1.0, weakest or 1e-3, 32) @ axes.T
    if weakest == 0.0:
        covariance = axes[:, :10] @ axes[:, :10].T
    narrow, wide = Gaussian(np.zeros(32), covariance), Gaussian(np.zeros(32), 4.0 * covariance)
    assert frechet_distance(narrow, wide) == pytest.approx(np.trace(covariance), rel=1e-6)
    assert frechet_distance(wide, narrow) == pytest.approx(np.trace(covariance), rel=1e-6)


def test_kernel_distance_is_the_mean_over_all_pairs() -> None:
    x, y = GENERATED[:7, :5], REFERENCE[:6, :5]

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float((a @ b / 5 + 1) ** 3)

    def mean_within(z: NDArray[np.float64]) -> np.floating:
        return np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    between = np.mean([kernel(a, b) for a in x for b in y])
    expected = mean_within(x) + mean_within(y) - 2 * between
    assert kernel_distance(x, y, block_size=4) == pytest.approx(float(expected), rel=1e-12)
    assert kernel_distance(y, x, block_size=4) == pytest.approx(float(expected), rel=1e-12)


def test_precision_and_recall_change_places_with_the_sets() -> None:
    forward, backward = precision_recall(GENERATED, REFERENCE), precision_recall(REFERENCE, GENERATED)
    assert forward == tuple(reversed(backward))
    assert precision_recall(GENERATED, GENERATED) == (1.0, 1.0)
    assert precision_recall(GENERATED, GENERATED + 1e3) == (0.0, 0.0)


def test_mode_collapse_keeps_precision_and_loses_recall() -> None:
    collapsed = np.repeat(REFERENCE[:1], 50, axis=0)
    assert precision_recall(collapsed, REFERENCE) == (1.0, 1 / len(REFERENCE))
    assert precision_recall(collapsed, collapsed) == (1.0, 1.0)


@pytest.mark.parametrize("block_size", [7, 64])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("kind", ["normal", "lattice", "repeated"])
def test_precision_and_recall_are_those_of_all_distances(kind: str, k: int, block_size: int) -> None:
    """Against the definition, with a difference a pair; on the lattice distances are exact and most of them ties."""
    rng = np.random.default_rng(k)
    if kind == "lattice":
        x, y = rng.integers(0, 4, (60, 3)).astype(np.float64), rng.integers(1, 5, (45, 3)).astype(np.float64)
    else:
        x, y = rng.standard_normal((60, 5)), 1.5 * rng.standard_normal((45, 5)) + 0.5
    if kind == "repeated":
        x[20:40], y[:10] = x[:20], x[:10]

    def distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((a[:, None] - b) ** 2).sum(axis=2)

    def share(queries: NDArray[np.float64], centres: NDArray[np.float64]) -> float:
        within = distances(centres, centres)
        np.fill_diagonal(within, np.inf)
        radii = np.sort(within, axis=1)[:, k - 1]
        return float((distances(queries, centres) <= radii).any(axis=1).mean())

    assert precision_recall(x, y, k=k, block_size=block_size) == (share(x, y), share(y, x))


def test_inception_score_of_known_cases() -> None:
    assert inception_score(np.tile(np.eye(10), (4, 1))) == pytest.approx((10.0, 0.0))
    assert inception_score(np.full((40, 10), 0.1)) == pytest.approx((1.0, 0.0))
    assert inception_score(np.repeat(np.eye(2), 5, axis=0), split_size=5).mean == pytest.approx(1.0)  # sorted


def test_inception_score_leaves_no_small_split() -> None:
    """201 samples in splits of at most 200 make two of about 100, not one of 200 and one of 1."""
    halves = [inception_score(part).mean for part in (PROBABILITIES[:101], PROBABILITIES[101:201])]
    score = inception_score(PROBABILITIES[:201], split_size=200)
    assert score == pytest.approx((np.mean(halves), np.std(halves)))


def test_names_say_the_feature_space() -> None:
    own = compute_metrics(GENERATED, REFERENCE, ("fid", "kid"), space="swav")  # of a network of the caller's
    assert own.keys() == {"fd_swav", "kid_swav"}
    metrics = compute_metrics(GENERATED, REFERENCE, ("recall", "kid", "fid"), space="classifier")
    assert list(metrics) == ["recall_classifier", "kid_classifier", "fd_classifier"]
    assert metric_name("fid", "dinov2") == "fd_dinov2"
    inception = space_metrics("inception")
    assert [metric_name(metric, "inception") for metric in inception] == list(inception)
    assert inception == tuple(metric for metric in METRICS if metric != "cmmd")
    assert space_metrics("dinov2") == FEATURE_METRICS


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_features_of_lower_precision_are_widened(dtype: type[np.floating]) -> None:
    generated, reference = GENERATED.astype(dtype), REFERENCE.astype(dtype)
    wide = compute_metrics(generated.astype(np.float64), reference.astype(np.float64))
    assert compute_metrics(generated, reference) == pytest.approx(wide, rel=1e-12)


def with_value(value: float) -> NDArray[np.float64]:
    spoilt = GENERATED.copy()
    spoilt[[3, 3, 9], [0, 1, 2]] = value
    return spoilt


@pytest.mark.parametrize(
    ("generated", "reference", "message"),
    [
        (with_value(np.nan), REFERENCE, "2 of 600 generated features contain NaN or infinity"),
        (REFERENCE, with_value(np.inf), "2 of 600 reference features contain NaN or infinity"),
        (GENERATED[0], REFERENCE, r"generated features have shape \(64,\)"),
        (GENERATED, REFERENCE.reshape(750, 8, 8), r"reference features have shape \(750, 8, 8\)"),
        (GENERATED[:, :32], REFERENCE, "have 32 dimensions, but the reference features have 64"),
        (GENERATED[:3], REFERENCE, "3 generated features, but this metric needs at least 4"),
    ],
)
def test_features_that_do_not_fit_are_refused(
    generated: NDArray[np.float64], reference: NDArray[np.float64], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compute_metrics(generated, reference)


def test_too_few_samples_for_each_metric_are_refused() -> None:
    assert compute_metrics(GENERATED[:3], REFERENCE, ("kid",))  # k does not matter here
    with pytest.raises(ValueError, match="at least 2"):
        compute_metrics(GENERATED[:1], REFERENCE, ("fid",))
    with pytest.raises(ValueError, match="at least 6"):
        compute_metrics(GENERATED[:5], REFERENCE, ("precision",), k=5)
    with pytest.raises(ValueError, match="at least 2 samples, but there are 1"):
        frechet(GENERATED[:1], REFERENCE)
    with pytest.raises(ValueError, match="of 64 and of 32 dimensions"):
        FeatureStatistics.from_features(GENERATED).merge(FeatureStatistics.from_features(GENERATED[:, :32]))


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown metric 'fdd'"):
        compute_metrics(GENERATED, REFERENCE, ("fid", "fdd"))


def test_inception_score_refuses_logits() -> None:
    with pytest.raises(ValueError, match="softmax"):
        inception_score(np.log(PROBABILITIES))
    with pytest.raises(ValueError, match="split_size is 0"):
        inception_score(PROBABILITIES, split_size=0)
