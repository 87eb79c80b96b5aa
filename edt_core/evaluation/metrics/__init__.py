"""Metrics of generated samples against real ones, computed from features and class probabilities."""

from edt_core.evaluation.extractors import FEATURE_METRICS
from edt_core.evaluation.metrics.adm import AdmReference, count_images, read_adm, read_images
from edt_core.evaluation.metrics.compute import available_metrics, compute_metrics
from edt_core.evaluation.metrics.frechet import frechet_distance
from edt_core.evaluation.metrics.inception_score import InceptionScore, inception_score
from edt_core.evaluation.metrics.kernel import kernel_distance
from edt_core.evaluation.metrics.manifold import PrecisionRecall, precision_recall
from edt_core.evaluation.metrics.names import in_order, metric_name, metric_space, space_metrics
from edt_core.evaluation.metrics.neighbours import Neighbours, nearest_neighbours
from edt_core.evaluation.metrics.registry import METRICS
from edt_core.evaluation.metrics.sample_size import UNBIASED_FROM, bias_warning, rank_warning
from edt_core.evaluation.metrics.sets import FeatureSet
from edt_core.evaluation.metrics.statistics import FeatureStatistics, Gaussian

__all__ = [
    "FEATURE_METRICS",
    "METRICS",
    "UNBIASED_FROM",
    "AdmReference",
    "FeatureSet",
    "FeatureStatistics",
    "Gaussian",
    "InceptionScore",
    "Neighbours",
    "PrecisionRecall",
    "available_metrics",
    "bias_warning",
    "compute_metrics",
    "count_images",
    "frechet_distance",
    "in_order",
    "inception_score",
    "kernel_distance",
    "metric_name",
    "metric_space",
    "nearest_neighbours",
    "precision_recall",
    "rank_warning",
    "read_adm",
    "read_images",
    "space_metrics",
]
