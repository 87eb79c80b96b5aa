"""Whether a model overfits, from the curve of its held-out loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

HELD_OUT_LOSS = "holdout_loss"  # its column in a history
_RISES = 3  # in a row, at the end of the curve
_LEAST_RISE = 0.01  # above the lowest value, relative to it


@dataclass(frozen=True)
class Overfitting:
    """The step of the lowest held-out loss, and by how much of it the last one is higher."""

    step: int
    rise: float

    def __str__(self) -> str:
        return (
            f"The held-out loss was lowest at step {self.step:,} and has risen by {100 * self.rise:.2g} % since: the "
            "model is overfitting; train for fewer steps, on more images, or use a smaller model"
        )


def overfitting(history: Sequence[Mapping[str, float]]) -> Overfitting | None:
    """The overfitting that the rows of a history show; None if they show none.

    It is overfitting if the last three measurements each rose, and the last is more than 1 % above the lowest.
    """
    curve = [(row[HELD_OUT_LOSS], int(row["step"])) for row in history if HELD_OUT_LOSS in row]
    losses = [loss for loss, _ in curve]
    if len(losses) <= _RISES or any(later <= earlier for earlier, later in pairwise(losses[-_RISES - 1 :])):
        return None
    lowest, step = min(curve)
    rise = (losses[-1] - lowest) / lowest if lowest > 0 else 0.0
    return Overfitting(step, rise) if rise > _LEAST_RISE else None
