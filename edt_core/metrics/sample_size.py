"""What too few samples do to a metric, in words for the user."""

from collections.abc import Iterable

from edt_core.metrics.names import is_frechet

UNBIASED_FROM = 10_000  # samples: the least that the field reports; the usual 50,000 are biased a little, too


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
