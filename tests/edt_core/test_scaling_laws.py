"""Scaling laws: planted ones are found within their intervals, and what is not determined is refused."""

import numpy as np
import pytest

from edt_core.errors import UserError
from edt_core.evaluation.scaling import Point, bootstrap, fit, pareto

BUDGETS, WIDTHS = (1e12, 3e12, 1e13, 3e13), (0.25, 0.5, 1.0, 2.0, 4.0)
PLANTED = {"size_exponent": 0.55, "loss_exponent": 0.12, "floor": 0.08, "size_scale": 0.02, "loss_scale": 6.0}


def planted(noise: float, seeds: int = 1, budgets: tuple[float, ...] = BUDGETS) -> list[Point]:
    """Points whose parabolas have their minima on the planted laws."""
    draw = np.random.default_rng(1)
    points = []
    for budget in budgets:
        best = PLANTED["size_scale"] * budget ** PLANTED["size_exponent"]
        least = PLANTED["floor"] + PLANTED["loss_scale"] * budget ** -PLANTED["loss_exponent"]
        for seed in range(seeds):
            for times in WIDTHS:
                loss = least + 0.01 * np.log(times * 1.2) ** 2
                points.append(Point(budget, best * times * 1.2, loss * float(np.exp(noise * draw.normal())), seed))
    return points


def test_laws_without_noise_are_found_exactly() -> None:
    numbers = fit(planted(0.0)).numbers()
    assert numbers["size_exponent"] == pytest.approx(0.55, abs=1e-9)
    assert numbers["size_scale"] == pytest.approx(0.02, rel=1e-6)
    assert numbers["loss_exponent"] == pytest.approx(0.12, rel=1e-3)
    assert numbers["floor"] == pytest.approx(0.08, rel=1e-2)


@pytest.mark.parametrize("name", ["size_exponent", "loss_exponent", "floor"])
def test_planted_exponents_are_within_their_interval(name: str) -> None:
    intervals = bootstrap(planted(0.002, seeds=3), 200, 0.9)
    assert intervals.ends is not None
    low, high = intervals.ends[name]
    assert low <= PLANTED[name] <= high
    assert low < high
    assert bootstrap(planted(0.002, seeds=3), 200, 0.9) == intervals


def test_intervals_are_wider_for_noisier_points() -> None:
    quiet, noisy = (bootstrap(planted(noise, seeds=3), 100, 0.9).ends for noise in (0.0005, 0.004))
    assert quiet is not None
    assert noisy is not None
    lengths = [ends["size_exponent"][1] - ends["size_exponent"][0] for ends in (quiet, noisy)]
    assert lengths[0] < lengths[1]


def test_points_without_a_minimum_have_no_interval() -> None:
    flat = [Point(budget, width, 1.0 / width, 0) for budget in BUDGETS for width in WIDTHS]
    assert bootstrap(flat, 20, 0.9).ends is None


def test_fewer_than_three_budgets_are_refused() -> None:
    with pytest.raises(UserError, match="2 budgets, and a fit needs 3"):
        fit(planted(0.0, budgets=BUDGETS[:2]))


def test_a_minimum_outside_of_the_sizes_is_refused() -> None:
    points = [Point(b, w, 1.0 - 0.05 * np.log(w) + 0.001 * np.log(w) ** 2) for b in BUDGETS for w in WIDTHS]
    with pytest.raises(UserError, match=r"no minimum between its sizes, .* add narrower or wider"):
        fit(points)


def test_a_loss_that_does_not_decrease_is_refused() -> None:
    points = [Point(b, w, 0.5 + b / 1e14 + np.log(w) ** 2) for b in BUDGETS for w in WIDTHS]
    with pytest.raises(UserError, match="does not decrease with the budget"):
        fit(points)


def test_nothing_is_predicted_beyond_ten_times_the_budgets() -> None:
    laws = fit(planted(0.0))
    assert laws.size(3e14) == pytest.approx(0.02 * 3e14**0.55, rel=1e-6)
    assert laws.loss(1e13) == pytest.approx(0.08 + 6.0 * 1e13**-0.12, rel=1e-4)
    for budget in (4e14, 0.9e11):
        with pytest.raises(UserError, match="more than 10 times outside of the budgets"):
            laws.loss(budget)


def test_the_front_is_what_nothing_cheaper_beats() -> None:
    assert pareto([1, 2, 2, 3, 4], [5, 4, 3, 6, 1], lower_is_better=True) == [0, 2, 4]
    assert pareto([1, 2, 3], [1, 3, 2], lower_is_better=False) == [0, 1]
