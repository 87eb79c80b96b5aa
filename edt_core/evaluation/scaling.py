"""Scaling laws of trainings under fixed numbers of operations (arXiv 2203.15556, approaches 2 and 3; 2410.08184).

For each budget C a parabola of the loss in log N has its minimum at N_opt, the best number of parameters. Over the
budgets N_opt = a C^b, and the loss at these minima is L(C) = E + A C^-alpha. Both are least squares in log space.
Intervals are those of a bootstrap over seeds and points: seeds are drawn with replacement, then points of each budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.errors import UserError

LEAST_BUDGETS, LEAST_SIZES = 3, 3
FARTHEST = 10.0  # times the range of the budgets: beyond, nothing is predicted
_FLOORS = 40  # candidates for E in each refinement
_REFINEMENTS = 5
_REDRAWS = 50
_LEAST_SHARE = 0.5  # of the bootstrap's samples with a fit, below which there is no interval

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """The held-out loss of one training of `budget` operations of a model with so many parameters."""

    budget: float
    parameters: float
    loss: float
    seed: int = 0


@dataclass(frozen=True)
class Minimum:
    """The parabola of a budget: loss = curvature (ln N - ln parameters)² + loss at its minimum."""

    budget: float
    parameters: float
    loss: float
    curvature: float

    def at(self, parameters: Array) -> Array:
        """The loss of models with so many parameters."""
        return self.curvature * (np.log(parameters) - math.log(self.parameters)) ** 2 + self.loss


@dataclass(frozen=True)
class Fit:
    """N_opt = size_scale C^size_exponent, and L = floor + loss_scale C^-loss_exponent; see the module."""

    minima: tuple[Minimum, ...]
    size_scale: float
    size_exponent: float
    floor: float
    loss_scale: float
    loss_exponent: float

    def size(self, budget: float) -> float:
        """The best number of parameters for a budget. Raises UserError far from the budgets of the fit."""
        self._check(budget)
        return self.size_scale * float(budget**self.size_exponent)

    def loss(self, budget: float) -> float:
        """The loss of the best model for a budget. Raises UserError far from the budgets of the fit."""
        self._check(budget)
        return self.floor + self.loss_scale * float(budget**-self.loss_exponent)

    def numbers(self) -> dict[str, float]:
        """The numbers of the two laws."""
        return {name: value for name, value in asdict(self).items() if name != "minima"}

    def _check(self, budget: float) -> None:
        budgets = [minimum.budget for minimum in self.minima]
        if not min(budgets) / FARTHEST <= budget <= max(budgets) * FARTHEST * (1 + 1e-9):
            raise UserError(
                f"{budget:.3g} FLOPs are more than {FARTHEST:g} times outside of the budgets of the ladder, "
                f"{min(budgets):.3g} to {max(budgets):.3g}, so nothing is predicted; add a budget nearer to it"
            )


def fit(points: Sequence[Point]) -> Fit:
    """The two laws of some points. Raises UserError where they do not determine them."""
    by_budget: dict[float, list[Point]] = {}
    for point in points:
        by_budget.setdefault(point.budget, []).append(point)
    if len(by_budget) < LEAST_BUDGETS:
        raise UserError(
            f"the points have {len(by_budget)} budgets, and a fit needs {LEAST_BUDGETS}; add budgets to ladder.budgets"
        )
    minima = tuple(_minimum(budget, by_budget[budget]) for budget in sorted(by_budget))
    budgets, sizes, losses = (
        np.array(column, dtype=float)
        for column in zip(*((m.budget, m.parameters, m.loss) for m in minima), strict=True)
    )
    exponent, intercept = np.polyfit(np.log(budgets), np.log(sizes), 1)
    floor, scale, decrease = _loss_law(budgets, losses)
    return Fit(minima, math.exp(intercept), float(exponent), floor, scale, decrease)


def _minimum(budget: float, points: Sequence[Point]) -> Minimum:
    """The minimum of a budget's parabola, within the sizes that were trained."""
    sizes = np.log([point.parameters for point in points])
    if len(set(sizes)) < LEAST_SIZES:
        raise UserError(
            f"{budget:.3g} FLOPs have points of {len(set(sizes))} sizes, and a parabola needs {LEAST_SIZES}; add widths"
        )
    middle = sizes.mean()
    curvature, slope, offset = np.polyfit(sizes - middle, [point.loss for point in points], 2)
    place = middle - slope / (2 * curvature) if curvature > 0 else math.inf
    if not sizes.min() <= place <= sizes.max():
        ends = f"{math.exp(sizes.min()):,.0f} to {math.exp(sizes.max()):,.0f} parameters"
        raise UserError(
            f"the loss at {budget:.3g} FLOPs has no minimum between its sizes, {ends}; add narrower or wider models"
        )
    return Minimum(budget, math.exp(place), float(offset - slope**2 / (4 * curvature)), float(curvature))


def _loss_law(budgets: Array, losses: Array) -> tuple[float, float, float]:
    """E, A and alpha of L = E + A C^-alpha with the least squares of log L.

    For a given E, log(L - E) is linear in log C; weights (L - E) / L make its squares those of log L, to first order.
    """
    best = (0.0, 0.0, 0.0)
    low, high = 0.0, float(losses.min()) * (1 - 1e-6)
    for _ in range(_REFINEMENTS):
        floors = np.linspace(low, high, _FLOORS)
        scales, exponents, errors = _given_floors(floors, budgets, losses)
        place = int(errors.argmin())
        best = float(floors[place]), float(scales[place]), float(exponents[place])
        low, high = float(floors[max(place - 1, 0)]), float(floors[min(place + 1, _FLOORS - 1)])
    if best[2] <= 0:
        raise UserError(
            f"the loss does not decrease with the budget: {', '.join(f'{loss:.4g}' for loss in losses)}; train with "
            "budgets that are farther apart, or with a lower rate"
        )
    return best


def _given_floors(floors: Array, budgets: Array, losses: Array) -> tuple[Array, Array, Array]:
    """A, alpha and the sum of squares of log L for each E [F]."""
    x, rest = np.log(budgets)[None], losses[None] - floors[:, None]  # [1, B], [F, B]
    y, weights = np.log(rest), (rest / losses) ** 2
    total = weights.sum(1, keepdims=True)
    x_mean, y_mean = (weights * x).sum(1, keepdims=True) / total, (weights * y).sum(1, keepdims=True) / total
    slope = (weights * (x - x_mean) * (y - y_mean)).sum(1) / (weights * (x - x_mean) ** 2).sum(1)
    scale = np.exp(y_mean[:, 0] - slope * x_mean[:, 0])
    predicted = floors[:, None] + scale[:, None] * np.exp(slope[:, None] * x)
    return scale, -slope, ((np.log(predicted) - np.log(losses)) ** 2).sum(1)


@dataclass(frozen=True)
class Intervals:
    """Ends of the interval of each number of a fit, None if too few samples had a fit. `failed`: those without one."""

    ends: Mapping[str, tuple[float, float]] | None
    resamples: int
    failed: int


def bootstrap(points: Sequence[Point], resamples: int, level: float, seed: int = 0) -> Intervals:
    """The intervals of the fit's numbers that hold the share `level` of the samples, equal tails on both sides."""
    draw, fits = np.random.default_rng(seed), list[dict[str, float]]()
    for _ in range(resamples):
        try:
            fits.append(fit(_resampled(points, draw.integers)).numbers())
        except UserError:
            continue
    failed = resamples - len(fits)
    if len(fits) < max(_LEAST_SHARE * resamples, 1):
        return Intervals(None, resamples, failed)
    tails = (1 - level) / 2 * 100
    ends = {}
    for name in fits[0]:
        low, high = np.percentile([numbers[name] for numbers in fits], [tails, 100 - tails])
        ends[name] = float(low), float(high)
    return Intervals(ends, resamples, failed)


def _resampled(points: Sequence[Point], integers: Callable[..., Any]) -> list[Point]:
    """Seeds drawn with replacement, then as many points of each budget, of those seeds, as it has.

    The points of a budget are drawn again until they have enough sizes for a parabola: of 4 points every third sample
    would have too few.
    """
    seeds = sorted({point.seed for point in points})
    chosen = [seeds[index] for index in integers(len(seeds), size=len(seeds))]
    sample = []
    for budget in sorted({point.budget for point in points}):
        of_seeds = [p for seed in chosen for p in points if p.budget == budget and p.seed == seed]
        for _ in range(_REDRAWS):
            drawn = [of_seeds[index] for index in integers(len(of_seeds), size=len(of_seeds))]
            if len({point.parameters for point in drawn}) >= LEAST_SIZES:
                break
        sample += drawn
    return sample


def pareto(costs: Sequence[float], values: Sequence[float], *, lower_is_better: bool) -> list[int]:
    """Indices of the points that no cheaper point beats, by cost."""
    front, best = list[int](), math.inf
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], values[i] if lower_is_better else -values[i])):
        value = values[index] if lower_is_better else -values[index]
        if value < best:
            front.append(index)
            best = value
    return front
