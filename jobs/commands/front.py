"""Which sampling settings are worth their time: domination, the Pareto front, and successive halving."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edt_core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """A setting as it was measured: by `name`, the value of the metric and its deviation, and what an image costs.

    `spread`: standard deviation of `value` over the repeats, None for one set. `seconds`, `flops`: of the chain of an
    image, without decoding.
    """

    name: str
    value: float
    spread: float | None
    seconds: float
    flops: float


def dominates(first: Measured, second: Measured, lower: bool) -> bool:
    """Whether the first is not worse in metric and seconds, and better in one. `lower`: lower values are better."""
    better = first.value < second.value if lower else first.value > second.value
    not_worse = better or first.value == second.value
    return not_worse and first.seconds <= second.seconds and (better or first.seconds < second.seconds)


def front(points: Sequence[Measured], lower: bool) -> list[Measured]:
    """The points that no other dominates, fastest first. Points whose value is not finite are never on it."""
    finite = [point for point in points if math.isfinite(point.value)]
    kept = [point for point in finite if not any(dominates(other, point, lower) for other in finite)]
    return sorted(kept, key=lambda point: point.seconds)


def survivors(points: Sequence[Measured], number: int, lower: bool) -> list[str]:
    """The names of the best points: whole fronts, one beneath the other, until there are at least `number`."""
    rest, kept = list(points), list[Measured]()
    while rest and len(kept) < number:
        layer = front(rest, lower)
        if not layer:  # only values that are not finite are left
            break
        kept += layer
        rest = [point for point in rest if point not in layer]
    return [point.name for point in kept]


def halved(
    names: Sequence[str],
    rungs: Sequence[T],
    measure: Callable[[str, T], Measured | None],
    keep: Sequence[str],
    lower: bool,
) -> tuple[list[dict[str, Measured]], bool]:
    """Measure settings in rungs that cost more and more; after each, only the better half reaches the next.

    `measure(name, rung)` returns None when the time is over. The settings in `keep` reach the last rung in any case.
    Returns what each rung measured, by name, without a rung that did not end, unless it is the first; and whether all
    rungs ended.
    Source: successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), with fronts in place of ranks.
    """
    results: list[dict[str, Measured]] = []
    for rung in rungs:
        measured: dict[str, Measured] = {}
        for name in names:
            point = measure(name, rung)
            if point is None:
                return results or [measured], False
            measured[name] = point
        results.append(measured)
        best = survivors(list(measured.values()), -(-len(names) // 2), lower)
        names = [name for name in names if name in best or name in keep]
    return results, True


def best_of(points: Sequence[Measured], lower: bool) -> Measured:
    """The point with the best value. Raises UserError if no value is finite."""
    if not any(math.isfinite(point.value) for point in points):
        raise UserError("no setting has a finite value of the metric: the samples are not usable; check the model")
    return (min if lower else max)((p for p in points if math.isfinite(p.value)), key=lambda point: point.value)


def fastest_within(points: Sequence[Measured], lower: bool, limit: float) -> Measured:
    """The fastest point whose value is at most `limit` from the best, in units of the metric."""
    best = best_of(points, lower)
    near = [point for point in points if abs(point.value - best.value) <= limit]
    return min(near, key=lambda point: point.seconds)


def named_points(points: Sequence[Measured], lower: bool) -> Mapping[str, Measured]:
    """Points by the names that a user chooses them by.

    best: the best value. fastest: the fastest on the front. within-2%: the fastest within 2 % of the best value.
    within-noise: the fastest within two standard deviations of the best; only where there are several repeats.
    """
    best = best_of(points, lower)
    named = {"best": best, "within-2%": fastest_within(points, lower, 0.02 * abs(best.value))}
    if best.spread is not None:
        named["within-noise"] = fastest_within(points, lower, 2 * best.spread)
    return {**named, "fastest": front(points, lower)[0]}
