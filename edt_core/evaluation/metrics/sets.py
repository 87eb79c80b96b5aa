"""One side of a comparison: the stored features of a set of images in one feature space."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edt_core.evaluation.metrics.statistics import FeatureStatistics, Gaussian


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The data of one side in one feature space; None for data that it lacks.

    features: [N, D], the space's vectors. spatial: [N, D2], vectors of a spatial layer, for sFID.
    probabilities: [N, K] of classes, rows in the order of the samples, which must not be sorted by class.
    statistics, spatial_statistics: set if they are of more images than the vectors, or if there are no vectors;
    otherwise the Fréchet distance uses the statistics of the vectors.
    """

    features: NDArray[np.generic] | None = None
    spatial: NDArray[np.generic] | None = None
    probabilities: NDArray[np.generic] | None = None
    statistics: Gaussian | None = None
    spatial_statistics: Gaussian | None = None

    @property
    def has_statistics(self) -> bool:
        """Whether `gaussian` has data."""
        return self.statistics is not None or self.features is not None

    @property
    def has_spatial_statistics(self) -> bool:
        """Whether `spatial_gaussian` has data."""
        return self.spatial_statistics is not None or self.spatial is not None

    def gaussian(self, name: str) -> Gaussian:
        """`statistics` if set, otherwise those of the features. `name` names the side in messages.

        Raises UserError for features that are not [N >= 2, D] or not finite.
        """
        return _gaussian(self.statistics, self.features, name)

    def spatial_gaussian(self, name: str) -> Gaussian:
        """As `gaussian`, for the spatial layer."""
        return _gaussian(self.spatial_statistics, self.spatial, f"{name} spatial")


def _gaussian(statistics: Gaussian | None, features: NDArray[np.generic] | None, name: str) -> Gaussian:
    if statistics is not None:
        return statistics
    assert features is not None
    return FeatureStatistics.from_features(features, name).gaussian
