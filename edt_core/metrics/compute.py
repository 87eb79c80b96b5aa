"""The metrics of an evaluation, by name, from the features that it kept."""

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike

from edt_core.errors import UserError
from edt_core.metrics.features import checked_pair
from edt_core.metrics.frechet import FeatureStatistics, frechet_distance
from edt_core.metrics.kernel import kernel_distance
from edt_core.metrics.manifold import precision_recall

METRICS = ("fid", "kid", "precision", "recall")

# Only Inception's pooled features make a Fréchet distance an FID, only its spatial ones an sFID.
_FIELD_NAMES = {
    ("fid", "inception"): "fid",
    ("kid", "inception"): "kid",
    ("fid", "inception_spatial"): "sfid",
}


def metric_name(metric: str, space: str) -> str:
    """The name under which a metric in a feature space is reported.

    fid and kid are named so in the space "inception"; elsewhere they carry the space, as fd_classifier and
    kid_classifier, or fd_dinov2. The Fréchet distance of "inception_spatial" is the field's sfid. Precision
    and recall keep their names in every space.
    """
    if metric in ("precision", "recall"):
        return metric
    prefix = "fd" if metric == "fid" else metric
    return _FIELD_NAMES.get((metric, space), f"{prefix}_{space}")


def compute_metrics(
    generated: ArrayLike,
    reference: ArrayLike,
    which: Sequence[str] = METRICS,
    *,
    space: str = "inception",
    k: int = 3,
    block_size: int = 2048,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The metrics `which`, any of `METRICS`, of features [N, D] against [M, D], keyed by `metric_name`.

    space: the feature space, which decides the names. k: the neighbour of precision and recall.
    block_size, device: where and in what portions kid, precision and recall are computed, in float64.
    Raises UserError for an unknown metric, for features that are not finite or do not fit each other, and for
    fewer than two samples in a set, or than k + 1 for precision and recall.
    """
    unknown = sorted(set(which) - set(METRICS))
    if unknown:
        raise UserError(f"unknown metrics {unknown}. Choose from {list(METRICS)}.")
    wants_manifold = "precision" in which or "recall" in which
    generated, reference = checked_pair(generated, reference, k + 1 if wants_manifold else 2)

    values: dict[str, float] = {}
    if "fid" in which:
        values["fid"] = frechet_distance(
            FeatureStatistics.from_features(generated, "generated"),
            FeatureStatistics.from_features(reference, "reference"),
        )
    if "kid" in which:
        values["kid"] = kernel_distance(generated, reference, block_size=block_size, device=device)
    if wants_manifold:
        values |= precision_recall(generated, reference, k=k, block_size=block_size, device=device)._asdict()
    return {metric_name(metric, space): values[metric] for metric in which}
