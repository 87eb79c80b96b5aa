"""The evaluations along the training as a figure: the metric that decides, by step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edt_core.store.artifact import Artifact
from edt_core.store.layout import ALONG_NAME
from pipelines.report.figures import BLUE, ORANGE, Picture, drawn

ACCURACY = "accuracy_classifier"


@dataclass(frozen=True)
class AlongView:
    """The curve, with the step of its best value, and whether that is the last one.

    `samples` and `sampling_steps` of the protocol of each point. `steps_planned`, `patience`: of a training that these
    evaluations ended, else None.
    """

    metric: str
    curve: Picture
    best_step: int
    best: float
    last_step: int
    last: float
    samples: int
    sampling_steps: int
    steps_planned: int | None = None
    patience: int | None = None


def read_along(artifact: Artifact) -> Mapping[str, Any]:
    """The points and the protocol of an artifact of evaluations along a training."""
    values: Mapping[str, Any] = artifact.read_json(ALONG_NAME)
    return values


def along_view(
    along: Mapping[str, Any], metric: str, lower_is_better: bool, checkpoint: Artifact | None = None
) -> AlongView | None:
    """The curve of a metric; None if it was not measured, or has no finite value. `checkpoint`: of the training."""
    points = [point for point in along["points"] if math.isfinite(point.get(metric, math.nan))]
    if not points:
        return None
    ended = None if checkpoint is None else checkpoint.counts.get("patience")
    best, last = (min if lower_is_better else max)(points, key=lambda point: point[metric]), along["points"][-1]
    return AlongView(
        metric,
        _curve(points, metric),
        int(best["step"]),
        best[metric],
        int(last["step"]),
        last[metric],
        along["protocol"]["num_samples"],
        along["protocol"]["num_sampling_steps"],
        *((ended["of"], ended["evaluations"]) if ended else ()),
    )


def _curve(points: Sequence[Mapping[str, float]], metric: str) -> Picture:
    """The metric by step, and the accuracy of the classifier below it where that is another metric."""
    steps = np.array([point["step"] for point in points])
    names = [metric, *([ACCURACY] if ACCURACY in points[0] and metric != ACCURACY else [])]
    columns = [np.array([point.get(name, math.nan) for point in points]) for name in names]
    spread = np.array([point.get(f"{metric}_std", math.nan) for point in points])

    def paint(axes: list[Any]) -> None:
        for axis, name, values, colour in zip(axes, names, columns, (BLUE, ORANGE), strict=False):
            axis.plot(steps, values, "o-", color=colour, linewidth=1.6, markersize=4)
            axis.set_title(name)
        if np.isfinite(spread).any():
            axes[0].errorbar(steps, columns[0], yerr=np.nan_to_num(spread), fmt="none", ecolor=BLUE, elinewidth=1.0)
        axes[-1].set_xlabel("optimizer step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)

    described = "; ".join(
        f"{name} from {values[0]:.4g} at step {steps[0]:,.0f} to {values[-1]:.4g} at step {steps[-1]:,.0f}"
        for name, values in zip(names, columns, strict=True)
    )
    return drawn(described, paint, len(names))
