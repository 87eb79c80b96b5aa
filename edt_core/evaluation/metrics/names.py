"""The metrics, and their reported names.

A name states the metric and the feature space: in Inception's space names are the usual ones (fid, kid), in any other
they contain the space (fd_dinov2, kid_dinov2, precision_classifier), since values of two spaces are not comparable.
A metric that exists in one space only, such as sfid, needs no space in its name.
"""

from collections.abc import Iterable

from edt_core.errors import UserError
from edt_core.evaluation.extractors import FEATURE_METRICS, INCEPTION, PUBLISHED_SPACES, extractor_spec, known_spec
from edt_core.evaluation.metrics.registry import METRICS


def space_metrics(space: str) -> tuple[str, ...]:
    """The metrics of `METRICS` that exist in a space; in a caller's own space, those of features alone.

    The inception score needs Inception's probabilities, and sFID its spatial layer.
    """
    return FEATURE_METRICS if (spec := known_spec(space)) is None else spec.metrics


def metric_name(metric: str, space: str) -> str:
    """The reported name of a metric in a feature space.

    Raises UserError for an unknown metric, and for one that does not exist in the space.
    """
    check_metric(metric, space)
    if space == INCEPTION or metric not in FEATURE_METRICS:
        return metric
    return f"{'fd' if metric == 'fid' else metric}_{space}"


def metric_space(name: str) -> str:
    """The feature space of a reported name: fid_std -> inception, accuracy_classifier -> classifier."""
    metric = name.removesuffix("_std")
    if metric in METRICS:
        return _home(metric)
    return metric.rpartition("_")[2]


def _home(metric: str) -> str:
    """The space in which a metric's name has no suffix: the only one that it exists in, or Inception's."""
    return next(space for space in (INCEPTION, *PUBLISHED_SPACES) if metric in space_metrics(space))


def check_metric(metric: str, space: str) -> None:
    """Raise UserError for an unknown metric, and for one that does not exist in the space."""
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}. Choose from {list(METRICS)}.")
    if metric not in space_metrics(space):
        home = extractor_spec(_home(metric))
        raise UserError(
            f"{metric} needs outputs of the {home.title} network, which the space {space!r} does not have. "
            f"Choose from {list(space_metrics(space))}, or evaluate in the space {home.name!r}."
        )


def is_frechet(name: str) -> bool:
    """Whether a reported name is that of a Fréchet distance, not of its spread."""
    return name in ("fid", "sfid") or (name.startswith("fd_") and not name.endswith("_std"))


def in_order(names: Iterable[str]) -> list[str]:
    """Reported names in the order of `METRICS`, Fréchet distances first; unknown names come last, by name."""

    def place(name: str) -> tuple[int, str]:
        ranks = [rank for rank, metric in enumerate(METRICS) if name.startswith(metric)]
        return (0 if is_frechet(name) and name != "sfid" else ranks[0] if ranks else len(METRICS), name)

    return sorted(names, key=place)
