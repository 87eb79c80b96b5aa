"""One side of a comparison: what is kept of a set of images in one feature space."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edt_core.evaluation.metrics.statistics import FeatureStatistics, Gaussian


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What one side has in one feature space; None where it has not.

    features: [N, D], the space's vectors. spatial: [N, D2], vectors of a spatial layer, for sFID.
    probabilities: [N, K] of classes, rows in the order of the samples, which must not be sorted by class.
    statistics, spatial_statistics: given where they are of more images than the vectors kept here, or where no
    vectors are; otherwise the Fréchet distance takes those of the vectors.
    """

    features: NDArray[np.generic] | None = None
    spatial: NDArray[np.generic] | None = None
    probabilities: NDArray[np.generic] | None = None
    statistics: Gaussian | None = None
    spatial_statistics: Gaussian | None = None

    @property
    def has_statistics(self) -> bool:
        """Whether `gaussian` has something to give."""
        return self.statistics is not None or self.features is not None

    @property
    def has_spatial_statistics(self) -> bool:
        """Whether `spatial_gaussian` has something to give."""
        return self.spatial_statistics is not None or self.spatial is not None

    def gaussian(self, name: str) -> Gaussian:
        """The statistics given, else of the features. `name` says in messages which side is meant.

        Raises UserError for features that are not [N >= 2, D] or not finite.
        """
        return _gaussian(self.statistics, self.features, name)

    def spatial_gaussian(self, name: str) -> Gaussian:
        """The same of the spatial layer."""
        return _gaussian(self.spatial_statistics, self.spatial, f"{name} spatial")


def _gaussian(given: Gaussian | None, features: NDArray[np.generic] | None, name: str) -> Gaussian:
    if given is not None:
        return given
    assert features is not None
    return FeatureStatistics.from_features(features, name).gaussian
