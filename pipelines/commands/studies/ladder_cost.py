"""The cost of a ladder, shown before anything runs."""

from typing import TYPE_CHECKING

from edt_core.printing.console import say
from pipelines.commands.options import print_rows

if TYPE_CHECKING:
    from pipelines.config.schema import PipelineConfig

COLUMNS = ("model", "width", "seed", "budget", "parameters", "steps", "images", "FLOPs")


def show_cost(config: "PipelineConfig", tflops: float | None = None) -> None:
    """Print what each rung trains, and the sum of their operations; nothing for a configuration without a ladder.

    `tflops`: operations per second of the hardware, in units of 1e12, for the time.
    """
    from pipelines.config.ladder import cost_rows

    if not config.ladder.budgets:
        return
    rows = cost_rows(config)
    table = [
        {
            **row,
            "budget": f"{row['budget']:.3g}",
            "parameters": f"{row['parameters']:,}",
            "steps": f"{row['steps']:,}",
            "images": f"{row['images']:,}",
            "FLOPs": f"{row['flops']:.4g}",
        }
        for row in rows
    ]
    print_rows(table, COLUMNS, False, extra=("seed", "images"))
    total = sum(row["flops"] for row in rows)
    time = "" if tflops is None else f", {total / tflops / 1e12 / 3600:,.3g} hours at {tflops:g}e12 FLOPs a second"
    say(f"{len(rows)} trainings of {total:.4g} FLOPs together{time}; sampling and evaluation come on top\n")
