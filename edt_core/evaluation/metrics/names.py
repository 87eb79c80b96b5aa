"""The metrics, and the names under which they are reported.

A name says what was computed and in which feature space: in Inception's they are the field's own (fid, kid), in any
other they carry the space (fd_dinov2, kid_dinov2, precision_classifier), for values of two spaces are not comparable.
A metric of one space alone, as sfid, needs no space in its name.
"""

from collections.abc import Iterable

from edt_core.errors import UserError
from edt_core.evaluation.extractors import FEATURE_METRICS, INCEPTION, PUBLISHED_SPACES, extractor_spec, known_spec
from edt_core.evaluation.metrics.registry import METRICS


def space_metrics(space: str) -> tuple[str, ...]:
    """The metrics that exist in a space, of `METRICS`; in a space of the caller's own those that features alone give.

    Only Inception's probabilities make an inception score, only its spatial layer an sFID.
    """
    return FEATURE_METRICS if (spec := known_spec(space)) is None else spec.metrics


def metric_name(metric: str, space: str) -> str:
    """The name under which a metric in a feature space is reported.

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
    """The space in which a metric has its bare name: the only one that it exists in, or Inception's."""
    return next(space for space in (INCEPTION, *PUBLISHED_SPACES) if metric in space_metrics(space))


def check_metric(metric: str, space: str) -> None:
    """Raises UserError for an unknown metric, and for one that does not exist in the space."""
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}. Choose from {list(METRICS)}.")
    if metric not in space_metrics(space):
        home = extractor_spec(_home(metric))
        raise UserError(
            f"{metric} is made of the {home.title} network's outputs, the space {space!r} has none. "
            f"Choose from {list(space_metrics(space))}, or evaluate in the space {home.name!r}."
        )


def is_frechet(name: str) -> bool:
    """Whether a reported name is that of a Fréchet distance, not of its spread."""
    return name in ("fid", "sfid") or (name.startswith("fd_") and not name.endswith("_std"))


def in_order(names: Iterable[str]) -> list[str]:
    """Reported names in the order of `METRICS`, each distance first in its space; others come last, by name."""

    def place(name: str) -> tuple[int, str]:
        found = [rank for rank, metric in enumerate(METRICS) if name.startswith(metric)]
        return (0 if is_frechet(name) and name != "sfid" else found[0] if found else len(METRICS), name)

    return sorted(names, key=place)
