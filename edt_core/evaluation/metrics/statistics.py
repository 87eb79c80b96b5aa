"""Mean and covariance of features: as a Gaussian, and as mergeable sums.

Shapes: N samples, D dimensions. All in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edt_core.errors import UserError
from edt_core.evaluation.metrics.features import checked_features

FloatArray = NDArray[np.float64]
_ROWS_AT_ONCE = 8192
_ASYMMETRY = 1e-6  # of the largest entry: above the rounding of float32 sums, far below that of any other matrix


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A Gaussian of features, for Fréchet distances.

    mean: [D]. covariance: [D, D], unbiased. count: N, or None if unknown, as for published statistics.
    Raises UserError for shapes that do not match, values that are not finite, a covariance that is not symmetric or
    has negative variances, and fewer than two samples.
    """

    mean: FloatArray
    covariance: FloatArray
    count: int | None = None

    def __post_init__(self) -> None:
        _check_moments(self.mean, self.covariance, "covariance")
        if self.count is not None and self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, but there are {self.count}. Add samples.")

    @property
    def dimensions(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def max_rank(self) -> int:
        """Upper bound of the covariance's rank: N samples have N - 1 independent deviations from their mean."""
        return self.dimensions if self.count is None else min(self.count - 1, self.dimensions)


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features as mergeable sums, so that each worker can compute its own.

    count: N. mean: [D]. scatter: [D, D], the sum of the outer products of the deviations from the mean.
    """

    count: int
    mean: FloatArray
    scatter: FloatArray

    @classmethod
    def from_features(cls, features: ArrayLike, name: str = "given") -> "FeatureStatistics":
        """Statistics of features [N, D], N >= 1. `name` names the features in messages.

        Raises UserError for another shape and for values that are not finite.
        """
        array = checked_features(features, name, min_samples=1)
        total = None
        for start in range(0, len(array), _ROWS_AT_ONCE):  # limits the memory of the float64 copy
            rows = array[start : start + _ROWS_AT_ONCE].astype(np.float64)
            mean = rows.mean(axis=0)
            rows -= mean
            part = cls(len(rows), mean, rows.T @ rows)
            total = part if total is None else total.merge(part)
        assert total is not None
        return total

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike]) -> "FeatureStatistics":
        """Statistics from the arrays of `to_arrays`.

        Raises UserError for arrays that are missing, do not match or are not finite, a scatter that is not symmetric
        or has a negative diagonal, and an invalid count.
        """
        missing = [key for key in ("count", "mean", "scatter") if key not in arrays]
        if missing:
            raise UserError(f"the statistics lack {missing}; they contain {sorted(arrays)}. Compute them again.")
        count = np.asarray(arrays["count"])
        if count.size != 1 or not np.issubdtype(count.dtype, np.integer) or count.item() < 1:
            raise UserError(f"the statistics' count is {count}, not a number of samples. Compute them again.")
        mean, scatter = (np.asarray(arrays[key], dtype=np.float64) for key in ("mean", "scatter"))
        _check_moments(mean, scatter, "scatter")
        return cls(int(count.item()), mean, scatter)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Plain arrays for storage: count int64 [], mean float64 [D], scatter float64 [D, D]."""
        return {"count": np.asarray(self.count, dtype=np.int64), "mean": self.mean, "scatter": self.scatter}

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Statistics of both sets together, by the update of Chan, Golub & LeVeque 1979.

        Raises UserError for different numbers of dimensions.
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
            raise UserError(f"a covariance needs at least 2 samples, but there are {self.count}. Add samples.")
        return self.scatter / (self.count - 1)

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian fitted to the features. Raises UserError for fewer than two samples."""
        return Gaussian(self.mean, self.covariance, self.count)


def _check_moments(mean: FloatArray, matrix: FloatArray, name: str) -> None:
    """Raise UserError unless mean [D] and matrix [D, D] can be moments of features. `name`: of the matrix."""
    if mean.ndim != 1 or not len(mean) or matrix.shape != (len(mean), len(mean)):
        raise UserError(
            f"statistics have a mean of shape {mean.shape} and a {name} of shape {matrix.shape}; "
            "[D] and [D, D] are needed. Check whether their names were swapped."
        )
    bad = int(np.sum(~np.isfinite(mean)) + np.sum(~np.isfinite(matrix)))
    if bad:
        raise UserError(f"{bad} values of the statistics are NaN or infinity. Compute them from finite features.")
    largest = float(np.max(np.abs(matrix)))
    asymmetry = float(np.max(np.abs(matrix - matrix.T)))
    if asymmetry > _ASYMMETRY * largest:
        raise UserError(
            f"the {name} of the statistics is not symmetric: entries differ from their transposes by up to "
            f"{asymmetry:g}, and the largest entry is {largest:g}. Compute it again, or use another file."
        )
    lowest = float(np.min(np.diagonal(matrix)))
    if lowest < 0.0:
        raise UserError(
            f"the {name} of the statistics has {lowest:g} on its diagonal, but variances are at least 0. Compute it "
            "again, or use another file."
        )
