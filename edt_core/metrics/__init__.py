"""Metrics of generated samples against real ones, computed from features and class probabilities."""

from edt_core.metrics.compute import METRICS, compute_metrics, metric_name
from edt_core.metrics.frechet import FeatureStatistics, frechet_distance
from edt_core.metrics.inception_score import InceptionScore, inception_score
from edt_core.metrics.kernel import kernel_distance
from edt_core.metrics.manifold import PrecisionRecall, precision_recall

__all__ = [
    "METRICS",
    "FeatureStatistics",
    "InceptionScore",
    "PrecisionRecall",
    "compute_metrics",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "metric_name",
    "precision_recall",
]
