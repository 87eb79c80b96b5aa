"""The classes that a classifier predicts for images: counts of pairs of classes, and accuracies with intervals.

Legend: N images, K classes, m pairs of classes that occur.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Accuracy:
    """The number of images, and how many of them are classified correctly."""

    images: int
    right: int

    @property
    def value(self) -> float | None:
        """The share, 0..1; None without images."""
        return self.right / self.images if self.images else None

    def interval(self, confidence: float) -> tuple[float, float]:
        """Wilson's score interval of the share (Wilson 1927); 0..1 without images."""
        if not self.images:
            return 0.0, 1.0
        n, p = self.images, self.right / self.images
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
        return 0.0 if self.right == 0 else low, 1.0 if self.right == n else high  # exact at the ends, without rounding


@dataclass(frozen=True, eq=False)
class Confusion:
    """Counts of images by their class and predicted class: the pairs that occur, in order.

    `labels` and `predictions` int64 [m] are class indices, `counts` int64 [m] are 1 or more.
    """

    num_classes: int
    labels: Ints
    predictions: Ints
    counts: Ints

    @classmethod
    def of(cls, labels: Ints, predictions: Ints, num_classes: int) -> "Confusion":
        """Count images by their labels and predictions, int64 [N]. Raises ValueError for an invalid class index."""
        if labels.shape != predictions.shape:
            raise ValueError(f"{labels.shape} labels and {predictions.shape} predictions are not of the same images")
        for name, values in (("label", labels), ("prediction", predictions)):
            if len(values) and not 0 <= values.min() <= values.max() < num_classes:
                raise ValueError(f"the {name}s {values.min()}..{values.max()} are not all among {num_classes} classes")
        pairs, counts = np.unique(labels.astype(np.int64) * num_classes + predictions, return_counts=True)
        return cls(num_classes, pairs // num_classes, pairs % num_classes, counts.astype(np.int64))

    def arrays(self) -> dict[str, Ints]:
        """The arrays for `from_arrays`."""
        return {"labels": self.labels, "predictions": self.predictions, "counts": self.counts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Ints], num_classes: int) -> "Confusion":
        return cls(num_classes, arrays["labels"], arrays["predictions"], arrays["counts"])

    def by_class(self) -> list[Accuracy]:
        """The accuracy on the images of each class."""
        own = self.labels == self.predictions
        images, right = np.zeros(self.num_classes, np.int64), np.zeros(self.num_classes, np.int64)
        np.add.at(images, self.labels, self.counts)
        right[self.labels[own]] = self.counts[own]
        return [Accuracy(*pair) for pair in zip(images.tolist(), right.tolist(), strict=True)]

    def overall(self) -> Accuracy:
        """The accuracy on all images, in which a class counts in proportion to its images."""
        own = self.labels == self.predictions
        return Accuracy(int(self.counts.sum()), int(self.counts[own].sum()))

    def mean_over_classes(self) -> float | None:
        """The mean of the accuracies of the classes with images, each counted equally. None without images."""
        values = [accuracy.value for accuracy in self.by_class() if accuracy.value is not None]
        return math.fsum(values) / len(values) if values else None

    def mistakes(self, label: int, most: int) -> list[tuple[int, int]]:
        """The `most` most frequent wrong predictions for images of a class: (predicted class, count)."""
        rows = (self.labels == label) & (self.predictions != label)
        pairs = zip(self.predictions[rows].tolist(), self.counts[rows].tolist(), strict=True)
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:most]

    def matrix(self) -> Ints:
        """All pairs, int64 [K, K]: a row is the class of the images, a column the predicted class."""
        whole = np.zeros((self.num_classes, self.num_classes), np.int64)
        whole[self.labels, self.predictions] = self.counts
        return whole
