"""What a search found: the outcome of each trial, the best of them, and what is doubtful about it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.studies.tune.search import Search, Trial
from pipelines.studies.tune.space import Parameter, shown

Ended = Literal["finished", "diverged", "failed"]
_LEAST = 3  # values of a field: the best of two is always at an edge
RESULT_VERSION = 1


@dataclass(frozen=True)
class Row:
    """The outcome of one trial. `curve`: (step, held-out loss) along it; `problem`: why it has no loss."""

    trial: Trial
    outcome: Ended
    loss: float | None = None
    checkpoint: str = ""
    curve: tuple[tuple[int, float], ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Results:
    """The rows of all trials, in their order."""

    search: Search
    rows: Sequence[Row]

    @property
    def best(self) -> Row | None:
        """The trial with the lowest held-out loss; of equal ones the first. None if none finished."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> list[Row]:
        """The finished trials, best first."""
        finished = [(row.loss, place, row) for place, row in enumerate(self.rows) if row.loss is not None]
        return [row for _, _, row in sorted(finished, key=lambda item: item[:2])]

    def of(self, outcome: Ended) -> list[Row]:
        """The trials that ended like this."""
        return [row for row in self.rows if row.outcome == outcome]

    @property
    def complete(self) -> bool:
        """Whether every trial has an outcome of its own: a loss, or that it diverged."""
        return not self.of("failed")

    def edges(self) -> list[str]:
        """What to search next for each field whose best value is the least or the greatest of those tried."""
        return [text for parameter in self.search.space if (text := self._edge(parameter))]

    def _edge(self, parameter: Parameter) -> str:
        values = {row.trial.point[parameter.field] for row in self.rows if row.outcome != "failed"}
        if self.best is None or len(values) < _LEAST or not all(_is_number(value) for value in values):
            return ""
        value = self.best.trial.point[parameter.field]
        if value not in (min(values), max(values)):
            return ""
        highest = value == max(values)
        end = "highest" if highest else "lowest"
        example = "" if parameter.is_choice else f", such as --param {parameter.wider(highest)}"
        return (
            f"the best {parameter.name}, {shown(value)}, is the {end} that was tried, so the optimum may lie beyond "
            f"it; search a wider range{example}"
        )

    def remarks(self) -> Iterator[str]:
        """What a reader has to know besides the table."""
        total = len(self.rows)
        for outcome, meaning in (
            ("diverged", "because a loss or a gradient was not finite"),
            ("failed", "so the search is incomplete"),
        ):
            if rows := [row for row in self.rows if row.outcome == outcome]:
                names = "; ".join(f"{row.trial.name} ({values_text(self.search, row.trial)})" for row in rows)
                yield f"{len(rows)} of {total} trials {outcome}, {meaning}: {names}"
        yield from self.edges()

    def as_json(self) -> str:
        """All of it as JSON. Equal searches have equal bytes: no times, places or machines."""
        search, best = self.search, self.best
        values: dict[str, Any] = {
            "version": RESULT_VERSION,
            "model": search.model,
            "width": search.width,
            "full_width": search.full_width,
            "seed": search.seed,
            "space": [str(parameter) for parameter in search.space],
            "flops": search.flops,
            "trials": [_row_values(row) for row in self.rows],
            "diverged": len(self.of("diverged")),
            "failed": len(self.of("failed")),
            "best": None if best is None else {"trial": best.trial.name, "loss": best.loss, "values": best.trial.point},
            "edges": self.edges(),
        }
        return json.dumps(values, indent=1, sort_keys=True) + "\n"


def _row_values(row: Row) -> Mapping[str, Any]:
    return {
        "trial": row.trial.name,
        "values": row.trial.point,
        "steps": row.trial.steps,
        "flops": row.trial.flops,
        "outcome": row.outcome,
        "loss": row.loss,
        "checkpoint": row.checkpoint,
        "curve": [list(point) for point in row.curve],
    }


def values_text(search: Search, trial: Trial) -> str:
    """The values of a trial, as train.lr 0.001."""
    return ", ".join(f"{parameter.name} {shown(trial.point[parameter.field])}" for parameter in search.space)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
