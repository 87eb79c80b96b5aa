"""Inception score: confidence of single predictions, and variety of all predictions."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edt_core.errors import UserError
from edt_core.evaluation.metrics.features import checked_features


class InceptionScore(NamedTuple):
    """Mean and population standard deviation of the score over the splits."""

    mean: float
    std: float


def inception_score(probabilities: ArrayLike, *, split_size: int = 5000) -> InceptionScore:
    """exp(E[KL(p(y|x) || p(y))]) of class probabilities [N, K] (Salimans et al. 2016, arXiv 1606.03498).

    The samples are split in order into the fewest nearly equal parts of at most `split_size`, so they must not be
    sorted by class. Raises UserError for a split size below 1 and for rows that are not probabilities.
    """
    if split_size < 1:
        raise UserError(f"split_size is {split_size}, but it must be at least 1; 5000 is usual.")
    p = checked_features(probabilities, "probability", min_samples=1).astype(np.float64)
    worst = float(np.max(np.abs(p.sum(axis=1) - 1.0)))
    if p.min() < 0.0 or worst > 1e-3:
        raise UserError(
            f"rows of probabilities must be at least 0 and sum to 1, but the smallest value is {p.min():g} and "
            f"a sum is off by {worst:g}. Pass the softmax of the logits, in float32."
        )
    scores = [_score(part) for part in np.array_split(p, math.ceil(len(p) / split_size))]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(p: NDArray[np.float64]) -> float:
    """The score of one split, [n, K]."""
    marginal = p.mean(axis=0)
    entropy_gap = _negative_entropy(p).mean() - _negative_entropy(marginal)
    return float(np.exp(entropy_gap))


def _negative_entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of p log p over the last axis, where 0 log 0 = 0."""
    terms: NDArray[np.float64] = p * np.log(np.where(p > 0.0, p, 1.0))
    return terms.sum(axis=-1)
