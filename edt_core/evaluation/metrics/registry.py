"""The registry of metrics: one `Metric` for each, its interface to the rest of the project.

To register a metric, add it to `REGISTERED`, and its name to the spec of each feature space that it exists in.
"""

from collections.abc import Callable
from dataclasses import dataclass

from edt_core.evaluation.metrics.cmmd import cmmd
from edt_core.evaluation.metrics.kernel import kernel_distance

NEIGHBOURS = 3  # the default neighbour of precision and recall


@dataclass(frozen=True)
class Metric:
    """A metric by its name in `evaluate.metrics`.

    meaning: what it measures, for the reader of a report. lower_is_better: whether it is a distance.
    least_pairs: the least number of features of each side for a comparison in pairs; 0 if it compares none.
    distance: computes it from generated features [N, D] and reference features [M, D], with the keywords `block_size`
    and `device` of `kernel_distance`; None for a metric that needs other inputs, which `compute_metrics` computes.
    """

    name: str
    meaning: str
    lower_is_better: bool
    least_pairs: int = 0
    distance: Callable[..., float] | None = None


REGISTERED = (
    Metric("fid", "Fréchet distance in Inception's feature space", True),
    Metric("sfid", "Fréchet distance in Inception's spatial features", True),
    Metric("inception_score", "confidence and variety of Inception's class predictions", False),
    Metric("kid", "squared maximum mean discrepancy of the features, cubic kernel", True, 2, kernel_distance),
    Metric("precision", "share of generated images that lie among the real ones", False, NEIGHBOURS + 1),
    Metric("recall", "share of real images that lie among the generated ones", False, NEIGHBOURS + 1),
    Metric("cmmd", "squared maximum mean discrepancy of CLIP's features, Gaussian kernel, times 1,000", True, 2, cmmd),
)
REGISTRY = {metric.name: metric for metric in REGISTERED}
METRICS = tuple(REGISTRY)
