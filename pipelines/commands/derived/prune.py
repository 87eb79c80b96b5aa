"""The command `edt prune`: a shallower version of a registered model, which learns which blocks to keep."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    Assignments,
    StoreOption,
    TrackingUri,
    open_catalog,
    print_json,
)
from pipelines.commands.workflow import Address, NoOverlap, execute, print_plan

if TYPE_CHECKING:
    from pipelines.retrain.prune import Pruning


def prune(
    model: Annotated[str, typer.Argument(help="registered model to prune: NAME@ALIAS, NAME/NUMBER or NAME")],
    keep: Annotated[str, typer.Option(help="N:M, keep N of each M blocks in a row: 1:2 halves the depth")] = "1:2",
    name: Annotated[
        str | None, typer.Option(help="registry name of the pruned model  \\[default: a version of the same model]")
    ] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    mask_steps: Annotated[
        int | None,
        typer.Option(min=1, help="steps that learn which blocks to keep  \\[default: a tenth of the model's training]"),
    ] = None,
    train_steps: Annotated[
        int | None, typer.Option(min=1, help="steps after the cut  \\[default: half of the model's training]")
    ] = None,
    show_plan: Annotated[bool, typer.Option("--plan", help="show which steps would run, and start nothing")] = False,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    no_overlap: NoOverlap = False,
    as_json: AsJson = False,
) -> None:
    """Leave blocks out of a registered model, train it further, and gate it.

    \b
    Examples:
      edt prune edt-tiny-digits-32@champion --keep 1:2 --plan
      edt prune edt-xl-2-256@champion --keep 2:3 --name edt-xl-2-256-shallow
    """
    from jobs.runtime.cluster_address import check_named
    from pipelines.plan import plan
    from pipelines.retrain.prune import Request, prepare

    check_named(address)
    ratio = _ratio(keep)
    catalog = open_catalog(store, tracking_uri)
    pruning = prepare(catalog, Request(model, store, ratio, name, mask_steps, train_steps, tuple(assignments)))
    if show_plan:
        rows = [step.as_row() for step in plan(pruning.config, catalog)]
        if as_json:
            print_json({**_facts(pruning), "steps": rows})
            return
        for note in _notes(pruning):
            say(note)
        print_plan(rows)
        return
    execute(
        pruning.config,
        "prune",
        address,
        no_overlap,
        as_json,
        notes=list(_notes(pruning)),
        tracking_uri=catalog.tracking_uri,
    )


def _ratio(text: str) -> tuple[int, int]:
    """N and M. Raises UserError for another text."""
    from edt_core.config import check_keep

    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
    if match is None:
        raise UserError(f"--keep is {text!r}; give N:M, such as 1:2 to keep one of each two blocks in a row")
    ratio = int(match[1]), int(match[2])
    try:
        check_keep(ratio)
    except ValueError as error:
        raise UserError(f"--keep {text}: {error}") from None
    return ratio


def _facts(pruning: "Pruning") -> dict[str, Any]:
    from edt_core.models import count_macs, count_parameters, shadow

    models = [shadow(config) for config in (pruning.before, pruning.after)]
    train = pruning.config.train_of(pruning.name)
    return {
        "model": pruning.name,
        "uncut": f"{pruning.version.name}/{pruning.version.version}",
        "keep": list(pruning.config.prune.keep or ()),
        "blocks": [model.config.num_blocks for model in models],
        "parameters": [count_parameters(model) for model in models],
        "macs": [count_macs(model) for model in models],
        "mask_steps": pruning.config.prune.steps,
        "max_steps": train.max_steps,
    }


def _notes(pruning: "Pruning") -> Iterator[str]:
    facts = _facts(pruning)
    rows = zip(facts["blocks"], facts["parameters"], facts["macs"], strict=True)
    before, after = (f"{blocks} blocks, {count:,} parameters, {macs:,} MACs" for blocks, count, macs in rows)
    yield f"uncut     {facts['uncut']}: {before}"
    kept, size = facts["keep"]
    yield f"pruned    {facts['model']}: {after}"
    yield f"training  {facts['mask_steps']} steps to choose {kept} of each {size}, then {facts['max_steps']} steps"
