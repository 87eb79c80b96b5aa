"""The metrics of an evaluation, by name, from the stored features of both sets."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from edt_core.errors import UserError
from edt_core.evaluation.metrics.features import check_same_dimensions, checked_pair
from edt_core.evaluation.metrics.frechet import frechet_distance
from edt_core.evaluation.metrics.inception_score import inception_score
from edt_core.evaluation.metrics.manifold import precision_recall
from edt_core.evaluation.metrics.names import INCEPTION, check_metric, metric_name, space_metrics
from edt_core.evaluation.metrics.registry import NEIGHBOURS, REGISTRY
from edt_core.evaluation.metrics.sets import FeatureSet
from edt_core.evaluation.metrics.statistics import Gaussian

T = TypeVar("T")


def compute_metrics(
    generated: ArrayLike | FeatureSet,
    reference: ArrayLike | FeatureSet,
    which: Sequence[str] | None = None,
    *,
    space: str = INCEPTION,
    k: int = NEIGHBOURS,
    split_size: int = 5000,
    allow_rank_deficient: bool = False,
    block_size: int = 2048,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The metrics `which` of generated against reference, keyed by `metric_name`.

    generated, reference: features [N, D] and [M, D], or a FeatureSet for each side.
    which: any of `METRICS`, None for all that both sides have the data for; with only features, `FEATURE_METRICS`.
    The inception score is two values, inception_score and inception_score_std over splits of `split_size`.
    space: the feature space, which determines the names. k: the neighbour of precision and recall.
    allow_rank_deficient: compute Fréchet distances of fewer samples than a covariance of full rank needs.
    block_size, device: block size and device of comparisons in pairs, which are in float64.
    Raises UserError for an unknown metric or one that the sets lack data for, for features that are not finite or do
    not match, and for too few samples: below two, below k + 1 for precision and recall, or for full rank.
    """
    samples, real = _as_set(generated), _as_set(reference)
    metrics = _checked_metrics(which, samples, real, space)
    of_neighbours = "precision" in metrics or "recall" in metrics
    distances = {metric: distance for metric in metrics if (distance := REGISTRY[metric].distance) is not None}
    if of_neighbours or distances:  # checked first, so that invalid features fail before minutes of computation
        pair = checked_pair(_required(samples.features), _required(real.features), k + 1 if of_neighbours else 2)
    values: dict[str, float] = {}
    if "fid" in metrics:
        first, second = samples.gaussian("generated"), real.gaussian("reference")
        values["fid"] = _distance("fid", first, second, allow_rank_deficient)
    if "sfid" in metrics:
        first, second = samples.spatial_gaussian("generated"), real.spatial_gaussian("reference")
        values["sfid"] = _distance("sfid", first, second, allow_rank_deficient)
    if "inception_score" in metrics:
        score = inception_score(_required(samples.probabilities), split_size=split_size)
        values |= {"inception_score": score.mean, "inception_score_std": score.std}
    for metric, distance in distances.items():
        values[metric] = distance(*pair, block_size=block_size, device=device)
    if of_neighbours:
        values |= precision_recall(*pair, k=k, block_size=block_size, device=device)._asdict()
    named: dict[str, float] = {}
    for metric in metrics:
        named[metric_name(metric, space)] = values[metric]
        if metric == "inception_score":
            named["inception_score_std"] = values["inception_score_std"]
    return named


def available_metrics(generated: FeatureSet, reference: FeatureSet, space: str = INCEPTION) -> tuple[str, ...]:
    """The metrics of `METRICS` for which both sides have the data in this space."""
    return tuple(metric for metric in space_metrics(space) if _lacking(metric, generated, reference) is None)


def _checked_metrics(
    which: Sequence[str] | None, generated: FeatureSet, reference: FeatureSet, space: str
) -> tuple[str, ...]:
    """The metrics to compute. Raises UserError for one that cannot be computed, and if there is none."""
    metrics = available_metrics(generated, reference, space) if which is None else tuple(which)
    for metric in metrics:
        check_metric(metric, space)
        lacking = _lacking(metric, generated, reference)
        if lacking is not None:
            raise UserError(f"{metric} needs {lacking}. Store these too, or leave {metric} out.")
    if which is None and not metrics:
        lists = [f"{metric} needs {_lacking(metric, generated, reference)}" for metric in space_metrics(space)]
        raise UserError(f"no metric can be computed of the two sides: {'; '.join(lists)}. Store features of both.")
    return metrics


def _lacking(metric: str, generated: FeatureSet, reference: FeatureSet) -> str | None:
    """The data that a metric needs and the sides lack, or None."""
    if metric == "inception_score":
        return "class probabilities of the generated side" if generated.probabilities is None else None
    data, has = {
        "fid": ("features or statistics", lambda side: side.has_statistics),
        "sfid": ("spatial features or spatial statistics", lambda side: side.has_spatial_statistics),
    }.get(metric, ("features", lambda side: side.features is not None))
    sides = {"generated": generated, "reference": reference}
    lacking = [name for name, side in sides.items() if not has(side)]
    return f"{data} of the {' and the '.join(lacking)} side" if lacking else None


def _distance(metric: str, generated: Gaussian, reference: Gaussian, allow_rank_deficient: bool) -> float:
    """The Fréchet distance. Raises UserError for too few samples for full rank, unless that is allowed."""
    check_same_dimensions(generated.dimensions, reference.dimensions)
    for name, side in (("generated", generated), ("reference", reference)):
        if side.max_rank < side.dimensions and not allow_rank_deficient:
            raise UserError(
                f"{metric} of {side.count:,} {name} samples in {side.dimensions:,} dimensions: at least "
                f"{side.dimensions + 1:,} are needed for a covariance of full rank; draw more samples, use kid "
                "(unbiased for any number), or set allow_rank_deficient=true."
            )
    return frechet_distance(generated, reference)


def _as_set(side: ArrayLike | FeatureSet) -> FeatureSet:
    return side if isinstance(side, FeatureSet) else FeatureSet(features=np.asarray(side))


def _required(value: T | None) -> T:
    assert value is not None
    return value
