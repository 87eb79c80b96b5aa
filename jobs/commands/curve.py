"""The curve of a search: its front and named points as JSON, a table and a picture."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from edt_core.config import recorded_fields
from edt_core.errors import UserError
from edt_core.store.folder import Folder
from jobs.commands.clock import TIMED_SAMPLES
from jobs.commands.evaluate_model import RESULTS
from jobs.commands.front import Measured, front, named_points

if TYPE_CHECKING:
    from jobs.commands.pareto import Search

_COLOURS = ("#0b62c4", "#2d8659", "#8250df", "#9a6700", "#57606a")  # of the models, in turns
_GIVEN_COLOUR = "#b35000"


@dataclass(frozen=True)
class Curve:
    """What the last rung of a search measured. `given`: the point that all others are compared with.

    Raises UserError if nothing was measured, or no value is finite.
    """

    search: "Search"
    results: Sequence[Mapping[str, Measured]]  # of each rung, by the names of the points
    complete: bool
    given: str

    def __post_init__(self) -> None:
        if not self.points:
            raise UserError("the time was over before anything was measured; use a longer --budget-s")

    @property
    def points(self) -> list[Measured]:
        return list(self.results[-1].values())

    @cached_property
    def front(self) -> list[Measured]:
        return front(self.points, self.search.lower)

    @cached_property
    def named(self) -> Mapping[str, Measured]:
        return named_points(self.points, self.search.lower)

    @property
    def samples(self) -> int:
        """The number of samples of each point."""
        return self.search.rungs[len(self.results) - 1]

    @property
    def notes(self) -> list[str]:
        place = self.search.entrants[0].clock.place
        notes = [f"Times are of {place}, for batches of up to {TIMED_SAMPLES} images, without decoding."]
        tried = len(self.search.points)
        notes.append(f"{len(self.points)} of {tried} settings were measured with {self.samples:,} samples.")
        if not self.complete:
            largest = self.search.rungs[-1]
            notes.append(f"The time was over before the largest number, {largest:,}; rerun the command to resume.")
        return notes

    def write(self, out: Folder) -> None:
        """Write `results.json`, `.md` and `.png`."""
        first, of = self.search.entrants[0], self.search.points
        rows = {
            "model": first.label,
            "version": first.version,  # NAME/NUMBER of a registered version
            "metric": self.search.metric,
            "samples": self.samples,
            "complete": self.complete,
            "points": [
                {
                    **asdict(point),
                    "model": of[point.name].label,
                    "version": of[point.name].version,
                    "settings": recorded_fields(of[point.name].settings[point.name]),
                }
                for point in self.points
            ],
            "front": [point.name for point in self.front],
            "named": {name: point.name for name, point in self.named.items()},
            "notes": self.notes,
        }
        out.write_bytes(f"{RESULTS}.json", f"{json.dumps(rows, indent=1)}\n".encode())
        out.write_bytes(f"{RESULTS}.md", self._table().encode())
        out.write_bytes(f"{RESULTS}.png", self._picture())

    def _table(self) -> str:
        """The front, fastest first, and the given point, as Markdown."""
        given = self.results[-1].get(self.given)
        rows = [*self.front, *([given] if given is not None and given not in self.front else [])]
        heads = ("setting", self.search.metric, "s/image", "GFLOPs/image", "faster", "known as")
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for point in rows:
            spread = "" if point.spread is None else f" ± {point.spread:.2g}"
            faster = "" if given is None else f"{given.seconds / point.seconds:.3g}x"
            names = ", ".join(name for name, other in self.named.items() if other == point)
            cells = (point.name, f"{point.value:.4g}{spread}", f"{point.seconds:.3g}", f"{point.flops / 1e9:.3g}")
            lines.append(f"| {' | '.join((*cells, faster, names))} |")
        return "\n".join([*lines, "", *self.notes]) + "\n"

    def _picture(self) -> bytes:
        """Metric against seconds and operations an image: the points of each model, and the front as a line."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, cost, unit in zip(panels, ("seconds", "flops"), ("seconds", "FLOPs"), strict=True):
            for number, entrant in enumerate(self.search.entrants):
                colour = _COLOURS[number % len(_COLOURS)]
                for point in self.points:
                    if point.name in entrant.settings:
                        shown = _GIVEN_COLOUR if point.name == self.given else colour
                        values = getattr(point, cost), point.value
                        panel.errorbar(*values, yerr=point.spread, fmt="o", color=shown, markersize=4)
                panel.plot([], [], "o", color=colour, markersize=4, label=entrant.label)
            panel.set_xscale("log")
            panel.set_xlabel(f"{unit} an image")
            panel.grid(alpha=0.3)
        panels[0].plot([p.seconds for p in self.front], [p.value for p in self.front], "-", color="#57606a", lw=0.9)
        panels[0].set_ylabel(self.search.metric)
        if len(self.search.entrants) > 1:
            panels[1].legend(fontsize=8)
        figure.suptitle(f"{len(self.points)} settings; orange: {self.given}; line: Pareto front", fontsize=10)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
        return picture.getvalue()
