"""`edt scaling`: trainings of several widths under the same numbers of operations, and the laws that fit them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from pipelines.commands.options import Assignments, ConfigStore, catalog_if_any, print_rows
from pipelines.commands.studies.ladder_cost import show_cost
from pipelines.commands.workflow import Address, execute

if TYPE_CHECKING:
    from edt_core.store.artifact import Artifact
    from pipelines.config.schema import PipelineConfig

_STEP = "scaling"


def scaling(
    config: Annotated[str, typer.Argument(help="YAML file with a section `ladder`")],
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the cost, and start nothing")] = False,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="operations per second, in 1e12, for the time in the cost")
    ] = None,
    at: Annotated[
        float | None, typer.Option(min=1.0, help="also show the best size and loss for this many FLOPs")
    ] = None,
) -> None:
    """Train a ladder of models under fixed numbers of FLOPs, and fit scaling laws.

    Trainings are ordinary steps: rerun the command to resume. None of them is registered.

    \b
    Examples:
      edt scaling digits.yaml --dry-run
      edt scaling digits.yaml --set ladder.seeds=[0,1,2] --at 1e14
    """
    from pipelines.config.schema import load_config

    loaded = load_config(config, assignments, store)
    if not loaded.ladder.budgets:
        raise UserError(f"{config} has no ladder; add a section `ladder` with models, widths and budgets")
    show_cost(loaded, tflops)
    if dry_run:
        return
    execute(loaded, "run", address, no_overlap=False, as_json=False)
    artifact = result_of(loaded)
    if artifact is None:
        raise UserError(f"{loaded.store} has no result of this ladder; rerun the command")
    show_result(artifact, at)


def result_of(config: "PipelineConfig") -> "Artifact | None":
    """The artifact of the step `scaling` in the store, None if it is missing."""
    from edt_core.store.folder import Folder
    from edt_core.store.store import Store
    from pipelines.plan import plan

    planned = {step.step: step for step in plan(config, catalog_if_any(config.store))}
    return Store(Folder.at(config.store)).find(_STEP, planned[_STEP].fingerprint)


def show_result(artifact: "Artifact", at: float | None) -> None:
    """Print the points, the laws with their intervals, and what they predict for `at` operations."""
    from edt_core.store.layout import SCALING_FIGURES, SCALING_NAME

    found = artifact.read_json(SCALING_NAME)
    rows = [
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in found["points"]
    ]
    shown = [name for name in rows[0] if name not in ("name", "images_seen", "training_flops", "inference_flops")]
    print_rows(rows, shown, False, extra=("seed", "steps"))
    for model, laws in found["models"].items():
        say("")
        _show_laws(model, laws, found["confidence"], at)
    say("")
    for name in (SCALING_NAME, *SCALING_FIGURES):
        say(f"result    {artifact.path(name)}")


def _show_laws(model: str, laws: Mapping[str, Any], level: float, at: float | None) -> None:
    if "problem" in laws:
        say(f"{model}: no laws: {laws['problem']}")
        return
    from edt_core.evaluation.scaling import Fit, Minimum

    def number(name: str) -> str:
        ends = (laws["intervals"] or {}).get(name)
        interval = "" if ends is None else f" ({level:.0%} interval {ends[0]:.3g} to {ends[1]:.3g})"
        return f"{laws['numbers'][name]:.3g}{interval}"

    say(f"{model}: N_opt = a C^b, a {number('size_scale')}, b {number('size_exponent')}")
    say(f"  L = E + A C^-alpha, E {number('floor')}, A {number('loss_scale')}, alpha {number('loss_exponent')}")
    if laws["intervals"] is None:
        say(f"  no intervals: {laws['failed']} of {laws['resamples']} samples of the bootstrap have no fit")
    if at is not None:
        fit = Fit(tuple(Minimum(**minimum, curvature=0.0) for minimum in laws["minima"]), **laws["numbers"])
        say(f"  at {at:.3g} FLOPs: {fit.size(at):,.0f} parameters, held-out loss {fit.loss(at):.4g}")
