"""The losses of a training: means over the steps between two rows, and since the last checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUARTILES = 4


@dataclass
class History:
    """Losses of a training: `rows` are means over the steps since the previous row, `pending` the losses since then.

    Where the held-out loss was measured, a row has it too, or is of it alone.
    `score_sum` and `score_steps` are the summed loss and the number of steps since the last regular checkpoint.
    The history contains no times, so equal trainings have equal histories.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    pending: list[dict[str, float]] = field(default_factory=list)
    score_sum: float = 0.0
    score_steps: int = 0

    def add(self, losses: Mapping[str, float]) -> None:
        """Add the losses of one step."""
        self.pending.append(dict(losses))
        self.score_sum += losses["loss"]
        self.score_steps += 1

    def close_row(self, step: int, lr: float) -> dict[str, float]:
        """End a row and return it.

        A loss that some steps lack (a quartile without a timestep) is averaged over the others.
        """
        row = {"step": float(step), "lr": lr}
        for name in dict.fromkeys(name for losses in self.pending for name in losses):
            values = [losses[name] for losses in self.pending if name in losses]
            row[name] = sum(values) / len(values)
        self.rows.append(row)
        self.pending.clear()
        return row

    def add_measurement(self, step: int, values: Mapping[str, float]) -> None:
        """Add what was measured after a step: to its row, or else as a row of its own."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1] = {**self.rows[-1], **values}
        else:
            self.rows.append({"step": float(step), **values})

    def take_score(self) -> float | None:
        """Mean loss of the steps since the previous call; None if there was no step."""
        score = self.score_sum / self.score_steps if self.score_steps else None
        self.score_sum, self.score_steps = 0.0, 0
        return score

    def state(self) -> dict[str, Any]:
        """Copies of all values, in types that JSON can store."""
        return {
            "rows": list(self.rows),
            "pending": list(self.pending),
            "score_sum": self.score_sum,
            "score_steps": self.score_steps,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "History":
        return cls(list(state["rows"]), list(state["pending"]), state["score_sum"], state["score_steps"])


def named_losses(
    terms: Mapping[str, NDArray[np.float64]],
    quartiles: NDArray[np.int64],
    weights: NDArray[np.float64],
) -> dict[str, float]:
    """The losses of a step by name, from the loss terms [passes, B] of the global batch, and weights [B].

    The training minimises loss = loss_full + loss_masked. The terms are those of the full pass. loss_t0 .. loss_t3 are
    the full pass's loss by quartile [B] of the times, from least to most noise. All are weighted by importance.
    """
    total = reduce(np.add, terms.values())
    means = (total * weights).mean(axis=1)
    losses = {"loss": float(means.sum()), **dict(zip(("loss_full", "loss_masked"), means.tolist(), strict=False))}
    losses |= {name: float((term[0] * weights).mean()) for name, term in terms.items()}
    for number in range(QUARTILES):
        inside = quartiles == number
        if inside.any():
            losses[f"loss_t{number}"] = float(np.average(total[0, inside], weights=weights[inside]))
    return losses
