"""How many samples and images a metric needs, and what too few do to it, in words for the user."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edt_core.evaluation.extractors import known_spec
from edt_core.evaluation.metrics.names import is_frechet, metric_name
from edt_core.evaluation.metrics.registry import REGISTRY

UNBIASED_FROM = 10_000  # samples: the least that the field reports; the usual 50,000 are biased a little, too
# metric -> images that it compares in pairs, at least
PAIRWISE = {name: metric.least_pairs for name, metric in REGISTRY.items() if metric.least_pairs}


@dataclass(frozen=True)
class Shortfall:
    """A metric, by its reported name, that one side of a comparison is too small for."""

    metric: str
    side: str  # generated or reference
    have: int
    need: int
    dimensions: int | None = None  # of the features, where a covariance of full rank is what needs so many


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
    """What `compute_metrics` would refuse for their numbers alone: known before anything is computed.

    metrics: of `METRICS`. dimensions: of the space's features, None where not known; those of its spec are.
    generated, reference: numbers of samples and of real images; None where not known, or not a limit.
    generated_kept, reference_kept: of how many of them there are features to compare in pairs.
    """
    spec = known_spec(space)
    known = {"fid": dimensions, "sfid": None}
    if spec is not None:
        known = {"fid": spec.dimensions or dimensions, "sfid": spec.spatial_dimensions}
    for metric in metrics:
        dims = known.get(metric)
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
    """A warning for the Fréchet distances among reported names below 10,000 samples, or None.

    The bias falls as 1/N (Bińkowski et al. 2018, arXiv 1801.01401; Chong & Forsyth 2020, arXiv 1911.07023), with a
    slope that differs between models, so that small samples may even rank them wrongly.
    """
    frechet = [name for name in metric_names if is_frechet(name)]
    if num_samples >= UNBIASED_FROM or not frechet:
        return None
    beside = dict.fromkeys("kid" if name.endswith("fid") else f"kid_{name.removeprefix('fd_')}" for name in frechet)
    verb = "is" if len(frechet) == 1 else "are"
    return (
        f"{', '.join(frechet)} of {num_samples:,} samples {verb} biased upwards (below {UNBIASED_FROM:,} by much): "
        f"compare with values of as many samples alone, and read {', '.join(beside)}, unbiased at any number, beside it"
    )


def rank_warning(count: int | None, dimensions: int) -> str | None:
    """A warning where `count` samples cannot give a covariance of full rank, or None; also for a count not known."""
    if count is None or count > dimensions:
        return None
    return (
        f"{count:,} samples in {dimensions:,} dimensions give a covariance of rank {count - 1:,} at most, and a "
        f"Fréchet distance that tells more of their number than of them; full rank needs {dimensions + 1:,}"
    )
