"""The numbers of samples and images that a metric needs, and warnings for too few."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edt_core.evaluation.extractors import known_spec
from edt_core.evaluation.metrics.names import is_frechet, metric_name
from edt_core.evaluation.metrics.registry import REGISTRY

UNBIASED_FROM = 10_000  # samples: the least that papers report; even the usual 50,000 give a small bias
# metric -> least number of images that it compares in pairs
PAIRWISE = {name: metric.least_pairs for name, metric in REGISTRY.items() if metric.least_pairs}


@dataclass(frozen=True)
class Shortfall:
    """A metric, by its reported name, for which one side of a comparison is too small."""

    metric: str
    side: str  # generated or reference
    have: int
    need: int
    dimensions: int | None = None  # of the features, if the number is needed for a covariance of full rank


def shortfalls(
    metrics: Iterable[str],
    space: str,
    dimensions: int | None,
    generated: int,
    reference: int | None,
    *,
    generated_kept: int,
    reference_kept: int | None,
    allow_rank_deficient: bool = False,
) -> Iterator[Shortfall]:
    """The metrics that `compute_metrics` would reject for too few samples, found before anything is computed.

    metrics: of `METRICS`. dimensions: of the space's features, None if unknown; those of the space's spec are used
    first. generated, reference: numbers of samples and of real images; None if unknown or unlimited.
    generated_kept, reference_kept: numbers of their features that are stored for comparisons in pairs.
    """
    spec = known_spec(space)
    by_metric = {"fid": dimensions, "sfid": None}
    if spec is not None:
        by_metric = {"fid": spec.dimensions or dimensions, "sfid": spec.spatial_dimensions}
    for metric in metrics:
        dims = by_metric.get(metric)
        if metric in ("fid", "sfid"):
            sides = ((generated, "generated"), (reference, "reference"))
            need = 0 if allow_rank_deficient or dims is None else dims + 1
        else:
            sides = ((generated_kept, "generated"), (reference_kept, "reference"))
            need = PAIRWISE.get(metric, 0)
        for have, side in sides:
            if have is not None and have < need:
                yield Shortfall(metric_name(metric, space), side, have, need, dims)


def bias_warning(metric_names: Iterable[str], num_samples: int) -> str | None:
    """A warning about the Fréchet distances among reported names for fewer than 10,000 samples, or None.

    The bias decreases as 1/N (Bińkowski et al. 2018, arXiv 1801.01401; Chong & Forsyth 2020, arXiv 1911.07023), with a
    slope that differs between models, so that small samples may even rank models wrongly.
    """
    frechet = [name for name in metric_names if is_frechet(name)]
    if num_samples >= UNBIASED_FROM or not frechet:
        return None
    unbiased = dict.fromkeys("kid" if name.endswith("fid") else f"kid_{name.removeprefix('fd_')}" for name in frechet)
    verb = "is" if len(frechet) == 1 else "are"
    return (
        f"{', '.join(frechet)} of {num_samples:,} samples {verb} biased upwards (strongly below {UNBIASED_FROM:,}): "
        f"compare only with values of the same number of samples, and use {', '.join(unbiased)} too, which is unbiased "
        "for any number"
    )


def rank_warning(count: int | None, dimensions: int) -> str | None:
    """A warning if `count` samples are too few for a covariance of full rank; None if they are enough or unknown."""
    if count is None or count > dimensions:
        return None
    return (
        f"{count:,} samples in {dimensions:,} dimensions give a covariance of rank {count - 1:,} at most, and a "
        f"Fréchet distance that depends mostly on their number; full rank needs {dimensions + 1:,}"
    )
