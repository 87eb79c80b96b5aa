"""The metrics of one model that was trained several times, with a seed each: mean, spread, and what is significant."""

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev

SIGNIFICANT = 0.05  # a p-value below it is called significant


def seed_role(seed: int, role: str) -> str:
    """The role of an artifact of a further training of a model, with this seed, among those of its first training."""
    return f"seed_{seed}_{role}"


def names_of(trainings: Mapping[int, Mapping[str, float]]) -> list[str]:
    """The metrics that all trainings have, without the deviations over the repeats of one evaluation."""
    first, *others = trainings.values()
    return [
        name
        for name in first
        if all(name in other for other in others) and not (name.endswith("_std") and name.removesuffix("_std") in first)
    ]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation (n - 1) of two or more values."""
    return fmean(values), stdev(values)


def spread_text(trainings: Mapping[int, Mapping[str, float]]) -> dict[str, str]:
    """For each metric, "mean ± standard deviation" over two or more trainings, which are given by their seed."""
    columns = {name: mean_and_std([metrics[name] for metrics in trainings.values()]) for name in names_of(trainings)}
    return {name: f"{mean:.4g} ± {std:.2g}" for name, (mean, std) in columns.items()}


def seeds_text(trainings: Mapping[int, Mapping[str, float]]) -> str:
    """As "3 trainings (seeds 0, 1, 2)"."""
    return f"{len(trainings)} trainings (seeds {', '.join(map(str, trainings))})"


def p_values(groups: Mapping[str, Sequence[float]], base: str, paired: Collection[str] = ()) -> dict[str, float]:
    """For each group but `base`, the probability that chance alone makes its mean differ so much from that of `base`.

    Welch's t-test of each group against `base`, or of those in `paired` the t-test of the differences of values at the
    same place, corrected for their number by Holm's method (Holm 1979), so that the
    chance of any wrong finding stays below the level. NaN for a group, or a base, of fewer than two values. Of two
    groups without any spread it is 0 if their means differ, and 1 otherwise.
    """
    chances = {name: _chance(values, groups[base], name in paired) for name, values in groups.items() if name != base}
    tested = sorted((chance, name) for name, chance in chances.items() if chance == chance)
    corrected, largest = dict(chances), 0.0
    for place, (chance, name) in enumerate(tested):
        largest = corrected[name] = max(largest, min(1.0, (len(tested) - place) * chance))
    return corrected


def _chance(first: Sequence[float], second: Sequence[float], paired: bool) -> float:
    from scipy.stats import ttest_ind, ttest_rel

    if min(len(first), len(second)) < 2 or (paired and len(first) != len(second)):
        return float("nan")
    if len(set(first)) == len(set(second)) == 1 or (paired and _have_one_difference(first, second)):
        return float(first[0] == second[0])
    return float((ttest_rel(first, second) if paired else ttest_ind(first, second, equal_var=False)).pvalue)


def _have_one_difference(first: Sequence[float], second: Sequence[float]) -> bool:
    return len({one - other for one, other in zip(first, second, strict=True)}) == 1
