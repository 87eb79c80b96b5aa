"""Mean, spread and significance over the trainings of a model."""

import math

import numpy as np
import pytest

from edt_core.evaluation.trainings import mean_and_std, names_of, p_values, spread_text


def test_deviations_over_repeats_are_no_metrics() -> None:
    trainings = {0: {"fid": 3.0, "fid_std": 0.1, "x_std": 1.0}, 5: {"fid": 5.0, "fid_std": 0.2, "x_std": 2.0, "new": 1}}
    assert names_of(trainings) == ["fid", "x_std"]
    assert spread_text(trainings)["fid"] == "4 ± 1.4"
    assert mean_and_std([3.0, 5.0]) == (4.0, pytest.approx(math.sqrt(2)))


def test_p_values_are_those_of_welch_corrected_by_holm() -> None:
    """Worked by hand from the uncorrected values: the smallest counts three times, and the order is kept."""
    from scipy.stats import ttest_ind

    groups = {"base": [1.0, 1.1, 0.9], "far": [5.0, 5.2, 4.9], "near": [1.3, 1.1, 1.2], "same": [1.0, 1.2, 0.8]}
    raw = {n: float(ttest_ind(v, groups["base"], equal_var=False).pvalue) for n, v in groups.items() if n != "base"}
    corrected = p_values(groups, "base")
    assert corrected["far"] == pytest.approx(3 * raw["far"])
    assert corrected["near"] == pytest.approx(2 * raw["near"])
    assert corrected["same"] == max(raw["same"], 2 * raw["near"])


def test_chance_alone_is_seldom_called_significant() -> None:
    draws = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        groups = {str(number): draws.normal(size=3).tolist() for number in range(6)}
        wrong += min(p_values(groups, "0").values()) < 0.05
    assert wrong / 300 < 0.09


def test_groups_without_a_spread_or_of_one_value() -> None:
    assert math.isnan(p_values({"a": [1.0], "b": [2.0, 3.0]}, "a")["b"])
    assert p_values({"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [2.0, 2.0]}, "a") == {"b": 1.0, "c": 0.0}
