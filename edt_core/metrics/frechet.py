"""Fréchet distance of two Gaussians fitted to features: FID where the features are Inception's.

Shapes: N samples, D dimensions. All in float64.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edt_core.errors import UserError
from edt_core.metrics.features import check_same_dimensions, checked_features

FloatArray = NDArray[np.float64]
_EPSILON = float(np.finfo(np.float64).eps)
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features, kept as sums that merge: each worker makes its own.

    count: N. mean: [D]. scatter: [D, D], the sum of the outer products of the deviations from the mean.
    """

    count: int
    mean: FloatArray
    scatter: FloatArray

    @classmethod
    def from_features(cls, features: ArrayLike, name: str = "given") -> "FeatureStatistics":
        """Statistics of features [N, D], N >= 1. `name` says in messages which features are meant.

        Raises UserError for another shape and for values that are not finite.
        """
        array = checked_features(features, name, min_samples=1)
        total = None
        for start in range(0, len(array), _ROWS_AT_ONCE):  # bounds the float64 copy
            rows = array[start : start + _ROWS_AT_ONCE].astype(np.float64)
            mean = rows.mean(axis=0)
            rows -= mean
            part = cls(len(rows), mean, rows.T @ rows)
            total = part if total is None else total.merge(part)
        assert total is not None
        return total

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Statistics of both sets together, by the update of Chan, Golub & LeVeque 1979.

        Raises UserError where the numbers of dimensions differ.
        """
        if len(self.mean) != len(other.mean):
            raise UserError(
                f"features of {len(self.mean)} and of {len(other.mean)} dimensions cannot be merged. "
                "Extract all parts with the same feature network and layer."
            )
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = np.outer(gap, gap) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> FloatArray:
        """Unbiased covariance, [D, D]. Raises UserError for fewer than two samples."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, there are {self.count}. Add samples.")
        return self.scatter / (self.count - 1)


def frechet_distance(generated: FeatureStatistics, reference: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Fréchet distance (Heusel et al. 2017, eq. 6).

    Symmetric in its arguments. Covariances may be rank-deficient, as with fewer samples than dimensions: the
    value is then exact for the samples given, though it depends much on their number.
    Raises UserError for fewer than two samples in a set, and where the numbers of dimensions differ.
    """
    check_same_dimensions(len(generated.mean), len(reference.mean))
    first, second = generated.covariance, reference.covariance
    gap = generated.mean - reference.mean
    if generated.count > reference.count:  # factor the one of lower rank, so that the product below is small
        first, second = second, first
    distance = gap @ gap + np.trace(first) + np.trace(second) - 2.0 * trace_sqrt_product(first, second)
    return max(float(distance), 0.0)


def trace_sqrt_product(first: FloatArray, second: FloatArray) -> float:
    """tr((C1 C2)^(1/2)) of positive semidefinite [D, D] matrices, by symmetric eigendecompositions.

    With C1 = F F^T, the eigenvalues of C1 C2 that are not 0 are those of F^T C2 F. F leaves out the null
    space of C1, and what is left of rounding is cut off: the square root would raise 1e-16 of noise to 1e-8,
    times D.
    """
    values, vectors = np.linalg.eigh(first)
    kept = values > _noise_level(values)
    factor = vectors[:, kept] * np.sqrt(values[kept])
    product = np.linalg.eigvalsh(factor.T @ second @ factor)
    return float(np.sqrt(product[product > _noise_level(product)]).sum())


def _noise_level(eigenvalues: FloatArray) -> float:
    """Below this an eigenvalue cannot be told from 0 in float64."""
    return len(eigenvalues) * _EPSILON * float(np.max(np.abs(eigenvalues), initial=0.0))
