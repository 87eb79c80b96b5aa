"""A search as Markdown, as a picture of the loss against each field, and as the next configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from edt_core.printing.redaction import redacted_values
from pipelines.report.figures import BLUE, INK, ORANGE
from pipelines.studies.tune.result import Results, Row, values_text
from pipelines.studies.tune.space import Parameter, shown

_PANEL, _HEIGHT, _DPI = 4.6, 3.8, 110  # inches, and pixels of an inch
_NOTHING = "\N{EN DASH}"


def as_markdown(results: Results) -> str:
    """The trials, best first, then those without a loss, and the remarks."""
    search = results.search
    ordered = [*results.ranked(), *(row for row in results.rows if row.loss is None)]
    lines = [_heading(results), ["---"] * (4 + len(search.space)), *(_cells(results, row) for row in ordered)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    facts = (
        f"{len(results.rows)} trials of {search.model} at width {search.width} (full width {search.full_width}), "
        f"{search.flops:.3g} FLOPs together, seed {search.seed}. Space: "
        f"{', '.join(f'`{parameter}`' for parameter in search.space)}."
    )
    remarks = [f"**{remark[0].upper()}{remark[1:]}.**" for remark in results.remarks()]
    return "\n\n".join([f"# Search for {search.model}", facts, table, *remarks]) + "\n"


def _heading(results: Results) -> list[str]:
    return ["trial", *(parameter.name for parameter in results.search.space), "steps", "FLOPs", "held-out loss"]


def _cells(results: Results, row: Row) -> list[str]:
    mark = "**" if row is results.best else ""
    values = [shown(row.trial.point[parameter.field]) for parameter in results.search.space]
    loss = row.outcome if row.loss is None else f"{row.loss:.5g}"
    return [row.trial.name, *values, f"{row.trial.steps:,}", f"{row.trial.flops:.3g}", f"{mark}{loss}{mark}"]


def draw(results: Results, path: Path) -> None:
    """Write a PNG: the loss against the values of each field, and along the trials."""
    from matplotlib.figure import Figure

    space = results.search.space
    figure = Figure(figsize=(_PANEL * (len(space) + 1), _HEIGHT), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, len(space) + 1, squeeze=False)[0]
    for panel, parameter in zip(panels, space, strict=False):
        _against(panel, results, parameter)
    _along(panels[-1], results)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, metadata={"Software": None})


def _against(panel: Any, results: Results, parameter: Parameter) -> None:
    """Losses against one field. Trials that diverged are crosses at the upper edge."""
    places = _places(results, parameter)
    for row in results.rows:
        place = places[row.trial.name]
        if row.loss is not None:
            panel.plot(place, row.loss, "o", color=ORANGE if row is results.best else BLUE)
        else:
            panel.plot(place, 0.97, "x", color=INK, transform=panel.get_xaxis_transform())
    if parameter.kind == "log":
        panel.set_xscale("log")
    if parameter.is_choice:
        panel.set_xticks(range(len(parameter.values)), [shown(value) for value in parameter.values])
        panel.margins(x=0.2)
    panel.set(xlabel=parameter.name, ylabel="held-out loss", title=f"width {results.search.width}, x: no loss")


def _places(results: Results, parameter: Parameter) -> dict[str, Any]:
    """The place of each trial on the axis of a field: its value, or the number of its choice."""
    values = {row.trial.name: row.trial.point[parameter.field] for row in results.rows}
    return {name: parameter.values.index(value) if parameter.is_choice else value for name, value in values.items()}


def _along(panel: Any, results: Results) -> None:
    for row in results.ranked():
        best = row is results.best
        label = values_text(results.search, row.trial) if best else None
        steps, losses = [step for step, _ in row.curve], [loss for _, loss in row.curve]
        panel.plot(steps, losses, color=ORANGE if best else BLUE, alpha=1.0 if best else 0.4, label=label)
    panel.set(xlabel="optimizer step", ylabel="held-out loss", title="along the trials")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7)


def next_yaml(results: Results) -> str:
    """The next configuration as YAML: the user's, with the values of the best trial and the base width of muP."""
    search, best = results.search, results.best
    assert best is not None, "no trial finished"
    remarks: Sequence[str] = (
        f"The best of {len(results.rows)} trials of edt tune: {values_text(search, best.trial)}.",
        f"Held-out loss {best.loss:.5g} at width {search.width} after {best.trial.steps:,} steps.",
        f"muP adapts the values to the width {search.full_width} of {search.model}.",
    )
    values: dict[str, Any] = dict(redacted_values(search.next_values(best.trial.point)))
    return "".join(f"# {line}\n" for line in remarks) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
