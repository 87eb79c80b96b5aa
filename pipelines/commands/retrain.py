"""The command `edt retrain`: the champion of a model trained further on the images as they are now."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
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
from pipelines.commands.workflow import Address, DigestAgain, NoOverlap, execute, failures_notified, print_plan

if TYPE_CHECKING:
    from pipelines.plan import PlannedStep
    from pipelines.retrain.prepare import Retraining


def retrain(
    name: Annotated[str, typer.Argument(help="registered model, whose champion is trained further (or NAME@champion)")],
    images: Annotated[
        str | None, typer.Option(help="folder, file or URI of the images  \\[default: that of the champion's run]")
    ] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="steps of the training  \\[default: a quarter of the training from scratch]"),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="fit the networks again and start from random weights")
    ] = False,
    when_data_changed: Annotated[
        bool,
        typer.Option(
            "--when-data-changed",
            help="start nothing if the images are those of the champion, also with --set, --steps or --from-scratch",
        ),
    ] = False,
    show_plan: Annotated[
        bool, typer.Option("--plan", help="show what would change and which steps would run, and start nothing")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    no_overlap: NoOverlap = False,
    digest_again: DigestAgain = False,
    as_json: AsJson = False,
) -> None:
    """Train the champion of a model further on the present images, and compare them.

    \b
    Examples:
      edt retrain edt-tiny-digits-32 --plan
      edt retrain edt-s-2-256 --images /data/flowers --steps 20000 --address auto
    """
    from jobs.runtime.cluster_address import check_named
    from pipelines.config.schema import notify_config
    from pipelines.notification import Notification, notify
    from pipelines.registry.lookup import name_of_champion
    from pipelines.retrain.drift import drift_guard
    from pipelines.retrain.prepare import Request, done_before, planned, prepare
    from pipelines.schedule.record import UNCHANGED, report_to_scheduler
    from pipelines.terminal.terminal import Terminal

    with nullcontext() if show_plan else failures_notified(notify_config(assignments), name):
        check_named(address)
        catalog = open_catalog(store, tracking_uri)
        name = name_of_champion(catalog, name, "edt retrain")
        request = Request(name, store, images, tuple(assignments), steps, from_scratch, when_data_changed)
        with Terminal(to_stderr=True) as terminal:
            retraining = prepare(catalog, request, terminal, digest_again)
        rows = [] if retraining.nothing_to_do else planned(catalog, retraining)
        reason = retraining.nothing_to_do or done_before(catalog, retraining, rows)
        if retraining.over_limit and not (show_plan or reason):
            raise UserError(retraining.over_limit)
    if show_plan:
        _show_plan(retraining, rows, reason, as_json)
    elif reason:
        report_to_scheduler(UNCHANGED)
        nothing = Notification("nothing_to_do", retraining.config.name, reason, _facts(retraining))
        notify(retraining.config.notify, [nothing], lambda text: say(f"warning: {text}", err=True))
        _show_nothing(reason, as_json)
    else:
        changed = Notification("data_changed", retraining.config.name, str(retraining.delta), _facts(retraining))
        execute(
            retraining.config,
            "retrain",
            address,
            no_overlap,
            as_json,
            notes=list(_notes(retraining)),
            tracking_uri=catalog.tracking_uri,
            guard=drift_guard(retraining.config, retraining.champion),
            news=[changed] if retraining.delta else [],
        )


def _show_nothing(reason: str, as_json: bool) -> None:
    if as_json:
        print_json({"status": "nothing to do", "reason": reason})
    else:
        say(f"nothing to do: {reason}")


def _show_plan(retraining: "Retraining", rows: "list[PlannedStep]", reason: str, as_json: bool) -> None:
    """What changed, what it takes, and a line for each step."""
    from edt_core.store.folder import Folder
    from edt_core.store.store import Store
    from pipelines.retrain.drift import drift_text, planned_drift

    table = [step.as_row() for step in rows]
    drift = planned_drift(retraining.champion, Store(Folder.at(retraining.config.store)), rows)
    if as_json:
        print_json({"reason": reason, **_facts(retraining), "drift": drift, "steps": table})
        return
    if reason:
        say(f"nothing to do: {reason}")
        return
    for note in _notes(retraining):
        say(note)
    limit = retraining.config.retrain.max_drift
    if drift or limit is not None:
        at_most = "" if limit is None else f" (at most {limit:g})"
        say(f"drift     {drift_text(drift) or 'known when the new reference exists'}{at_most}")
    if retraining.over_limit:
        say(f"refused   {retraining.over_limit}")
    print_plan(table)


def _facts(retraining: "Retraining") -> dict[str, Any]:
    from pipelines.retrain.guard import device_hours

    (name,) = retraining.config.models
    version, train = retraining.champion, retraining.config.train_of(name)
    delta = retraining.delta
    return {
        "model": name,
        "champion": None if version is None else str(version.version),
        "init_from": train.init_from,
        "max_steps": train.max_steps,
        "images": retraining.source.images,
        "delta": None if delta is None else delta.to_dict(),
        "device_hours": device_hours(version, train.max_steps),
        "refused": retraining.over_limit,
        "notes": list(retraining.notes),
    }


def _notes(retraining: "Retraining") -> Iterator[str]:
    facts: Mapping[str, Any] = _facts(retraining)
    start = f"from version {facts['champion']}" if facts["init_from"] else "from random weights"
    yield f"starts    {start}, {facts['max_steps']} steps"
    change = f": {retraining.delta}" if retraining.delta is not None else ""
    yield f"images    {facts['images']}{change}"
    if facts["device_hours"] is not None:
        yield f"training  about {facts['device_hours']:.2g} device hours, at the pace of the champion"
    for note in retraining.notes:
        yield f"note      {note}"
