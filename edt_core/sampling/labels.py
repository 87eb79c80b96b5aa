"""Labels of the samples of an evaluation: a function of the seed and the sample's index, like their noise.

Shapes: n samples, K classes.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edt_core.diffusion.noise import LABEL_DRAW
from edt_core.errors import UserError

LabelPolicy = Literal["balanced", "uniform", "prior"]


def sample_labels(
    policy: LabelPolicy,
    seed: int,
    indices: Sequence[int] | NDArray[np.int64],
    num_classes: int,
    class_counts: Sequence[int] | NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """The classes of the samples `indices`, int64 [n] in 0..K-1.

    "balanced": classes in turn, index mod K, independent of the seed. "uniform": each class with equal probability.
    "prior": as often as in training, in proportion to `class_counts` [K]. A class with a count of 0 is never drawn.
    A drawn label depends only on (seed, index) and the classes. Raises UserError for an unknown policy, for missing or
    invalid counts, and for negative indices.
    """
    rows = np.asarray(indices, dtype=np.int64)
    if num_classes < 1 or seed < 0 or np.any(rows < 0):
        raise UserError(
            f"labels of seed {seed} for indices from {rows.min(initial=0)} and {num_classes} classes: "
            "seed and indices must not be negative, and there must be a class. Count samples from 0."
        )
    trained = trained_classes(num_classes, class_counts)
    if policy == "balanced":
        return trained[rows % len(trained)]
    if policy == "uniform":
        weights = np.bincount(trained, minlength=num_classes).astype(np.float64)
    elif policy == "prior":
        weights = _prior(class_counts, num_classes)
    else:
        raise UserError(f"unknown label policy {policy!r}. Choose 'balanced', 'uniform' or 'prior'.")
    cumulative = np.cumsum(weights)
    # Divided by its last entry it ends at exactly 1, above any uniform number; a class of weight 0 has no interval.
    return np.searchsorted(cumulative / cumulative[-1], _uniforms(seed, rows), side="right").astype(np.int64)


def trained_classes(
    num_classes: int, class_counts: Sequence[int] | NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The classes 0..K-1 with images, int64; all classes without counts. Raises UserError for invalid counts."""
    return np.arange(num_classes) if class_counts is None else np.flatnonzero(_counts(class_counts, num_classes))


def _uniforms(seed: int, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each sample, each from its own generator."""
    sequences = (np.random.SeedSequence(seed, spawn_key=(index, LABEL_DRAW)) for index in indices.tolist())
    return np.array([np.random.Generator(np.random.PCG64(sequence)).random() for sequence in sequences])


def _prior(class_counts: Sequence[int] | NDArray[np.int64] | None, num_classes: int) -> NDArray[np.float64]:
    if class_counts is None:
        raise UserError(
            "label_policy is prior, but the model's record has no class counts of its training. Use label_policy "
            "balanced or uniform, which need no counts."
        )
    return _counts(class_counts, num_classes)


def _counts(class_counts: Sequence[int] | NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.shape != (num_classes,):
        raise UserError(
            f"the model's record has {counts.size} class counts for {num_classes} classes: it is of another model"
        )
    if not np.all(np.isfinite(counts) & (counts >= 0)) or not counts.any():
        raise UserError(
            f"the class counts in the model's record, from {counts.min()} to {counts.max()}, must be 0 or more and not "
            "all 0"
        )
    return counts
