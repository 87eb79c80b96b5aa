"""What a model's metrics are worth: against chance, against real images, and against the noise of the measurement."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edt_core.evaluation.confusion import Accuracy

ACCURACY = "accuracy_classifier"
_SHARES = ("accuracy_", "precision_", "recall_")  # metrics that are shares of the samples
_CONFIDENCE = 0.95
DEVIATIONS = 2
_SMALL = 0.1  # of a distance: a smaller difference of two single measurements may be noise

Difference = Literal["clear", "noise", "unknown"]


@dataclass(frozen=True)
class Remark:
    """A sentence about a measurement. `doubt`: it is a reason not to trust the model or the metric."""

    text: str
    doubt: bool = False


@dataclass(frozen=True)
class Measured:
    """Metrics by name, each the mean over `repeats` sets of `samples` samples."""

    metrics: Mapping[str, float]
    samples: int
    repeats: int = 1


def chance(policy: str, num_classes: int, class_counts: Sequence[int] | None = None) -> float:
    """The accuracy of samples that do not depend on the requested class, at best.

    `class_counts` [K] of the training: classes without images are not requested; by the policy "prior", the others are
    as frequent as in training.
    """
    counts = [count for count in class_counts or [1] * num_classes if count]
    return max(counts) / sum(counts) if policy == "prior" else 1 / len(counts)


def noise_of_repeats(deviations: Sequence[float | None], repeats: int) -> float | None:
    """Two of the largest standard deviation of several repeats; None for one set, or if a deviation is unknown."""
    known = [value for value in deviations if value is not None]
    return DEVIATIONS * max(known) if repeats > 1 and len(known) == len(deviations) else None


def noise(name: str, before: Mapping[str, float], after: Measured) -> float | None:
    """How much a metric of two models may differ by chance; None if that is unknown.

    Two standard deviations of the repeats, or of the share of so many samples. Both models have the same protocol.
    """
    deviations = [metrics.get(f"{name}_std") for metrics in (before, after.metrics)]
    if (limit := noise_of_repeats(deviations, after.repeats)) is not None:
        return limit
    if name.startswith(_SHARES):
        share = (before[name] + after.metrics[name]) / 2
        return DEVIATIONS * math.sqrt(2 * max(share * (1 - share), 0.0) / (after.samples * after.repeats))
    return None


def difference(name: str, before: Mapping[str, float], after: Measured) -> Difference:
    """Whether a metric of two models differs by more than noise.

    "unknown": the noise is not known, and the values differ by less than a tenth.
    """
    first, second = before[name], after.metrics[name]
    limit = noise(name, before, after)
    if limit is not None:
        return "clear" if abs(first - second) > limit else "noise"
    return "clear" if abs(first - second) > _SMALL * max(abs(first), abs(second)) else "unknown"


def remarks(
    after: Measured,
    before: Mapping[str, float] | None,
    metric: str,
    lower_is_better: bool,
    by_chance: float,
    real: Accuracy | None,
) -> list[Remark]:
    """Remarks on the metrics of a model, and on `metric` beside that of the untrained model `before`.

    `by_chance`: the accuracy of samples that do not depend on the class. `real`: the classifier's accuracy for real
    images that it was not fitted on; None without a classifier.
    """
    found = []
    if (accuracy := after.metrics.get(ACCURACY)) is not None:
        found += _of_accuracy(accuracy, after.samples * after.repeats, by_chance, real)
    if metric in after.metrics and not math.isfinite(after.metrics[metric]):
        found.append(Remark(f"{metric} is {after.metrics[metric]}: the samples cannot be judged by it", doubt=True))
    elif before is not None and metric in after.metrics and math.isfinite(before.get(metric, math.nan)):
        found += _of_difference(metric, before, after, lower_is_better)
    return found


def _of_accuracy(accuracy: float, samples: int, by_chance: float, real: Accuracy | None) -> list[Remark]:
    found = []
    for_real = "" if real is None or real.value is None else f", {real.value:.3g} for real images it was not fitted on"
    facts = f"{ACCURACY} is {accuracy:.3g} (chance {by_chance:.3g}{for_real})"
    if _at_chance(Accuracy(samples, round(accuracy * samples)), by_chance):
        found.append(Remark(f"{facts}: the samples do not show the requested classes, as by chance", doubt=True))
    else:
        found.append(Remark(facts))
    if real is not None and _at_chance(real, by_chance):
        text = "the classifier recognizes real images no better than chance: metrics in its feature space say little"
        found.append(Remark(text, doubt=True))
    return found


def _at_chance(accuracy: Accuracy, by_chance: float) -> bool:
    return accuracy.images > 0 and accuracy.interval(_CONFIDENCE)[0] <= by_chance


def _of_difference(metric: str, before: Mapping[str, float], after: Measured, lower: bool) -> list[Remark]:
    values = f"{metric} is {after.metrics[metric]:.4g}, that of the untrained model {before[metric]:.4g}"
    verdict = difference(metric, before, after)
    if verdict == "noise":
        limit, sets = noise(metric, before, after), f"{after.repeats} repeats" if after.repeats > 1 else "the samples"
        text = f"{values}: no more than the noise of {sets} ({limit:.2g})"
        return [Remark(text, doubt=True)]
    if verdict == "unknown":
        text = f"{values}: nearly the same, and one set of samples does not show the noise (sample.repeats=3 does)"
        return [Remark(text, doubt=True)]
    if (after.metrics[metric] < before[metric]) != lower:
        return [Remark(f"{values}: training made it worse", doubt=True)]
    return []
