"""Fréchet distance of two Gaussians fitted to features: FID if the features are Inception's.

Shapes: D dimensions. All in float64.
"""

import numpy as np
from numpy.typing import NDArray

from edt_core.evaluation.metrics.features import check_same_dimensions
from edt_core.evaluation.metrics.statistics import FeatureStatistics, FloatArray, Gaussian

_EPSILON = float(np.finfo(np.float64).eps)


def frechet_distance(generated: Gaussian | FeatureStatistics, reference: Gaussian | FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Fréchet distance (Heusel et al. 2017, eq. 6).

    Symmetric in its arguments. Covariances may be rank-deficient, for example with fewer samples than dimensions: the
    value is then exact for these samples, but depends strongly on their number.
    Raises UserError for fewer than two samples in a set, and for different numbers of dimensions.
    """
    check_same_dimensions(len(generated.mean), len(reference.mean))
    first, second = _gaussian(generated), _gaussian(reference)
    gap = first.mean - second.mean
    if first.max_rank > second.max_rank:  # factor the covariance of lower rank, so that the product is small
        first, second = second, first
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    distance = gap @ gap + traces - 2.0 * trace_sqrt_product(first.covariance, second.covariance)
    return max(float(distance), 0.0)


def _gaussian(statistics: Gaussian | FeatureStatistics) -> Gaussian:
    return statistics.gaussian if isinstance(statistics, FeatureStatistics) else statistics


def trace_sqrt_product(first: FloatArray, second: FloatArray) -> float:
    """tr((C1 C2)^(1/2)) of positive semidefinite [D, D] matrices, by a symmetric eigendecomposition.

    With C1 = F F^T, the nonzero eigenvalues of C1 C2 are those of F^T C2 F. Rounding noise is cut off: the square root
    would turn 1e-16 of noise into 1e-8, times D.
    """
    factor = _factor(first)
    product = np.linalg.eigvalsh(factor.T @ second @ factor)
    return float(np.sqrt(product[product > _noise_level(product)]).sum())


def _factor(covariance: FloatArray) -> NDArray[np.floating]:
    """F [D, rank] with F F^T = C, for a positive semidefinite C.

    By Cholesky if C has full rank, which takes a tenth of the time; otherwise by the eigenvectors outside the null
    space.
    """
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        pass
    else:
        pivots = np.square(np.diagonal(factor))
        if pivots.min() > _noise_level(pivots):
            return factor
    values, vectors = np.linalg.eigh(covariance)
    is_significant = values > _noise_level(values)
    return vectors[:, is_significant] * np.sqrt(values[is_significant])


def _noise_level(eigenvalues: NDArray[np.floating]) -> float:
    """The level below which an eigenvalue cannot be distinguished from 0 in float64."""
    return len(eigenvalues) * _EPSILON * float(np.max(np.abs(eigenvalues), initial=0.0))
