"""edt gc: list what no model or recent run needs, ask, and move it to the trash."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.errors import UserError
from edt_core.printing.console import on_one_line, say
from edt_core.printing.redaction import redacted
from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    StoreOption,
    TrackingUri,
    open_catalog,
    print_json,
    print_rows,
)

if TYPE_CHECKING:
    from edt_core.store.store import Store
    from edt_core.store.trash import Discarded
    from pipelines.registry.cleaning import Plan, Removed
    from pipelines.registry.garbage import Garbage, Lineage


def gc(
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    keep_runs: Annotated[int, typer.Option(min=1, help="keep what the last N runs of each pipeline use")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be removed, and remove nothing")] = False,
    empty_trash: Annotated[
        bool, typer.Option("--empty-trash", help="also delete from the trash what is there for less than a day")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="remove without asking")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="also remove what this MLflow does not know or what is unreadable; in a remote store, even if MLflow "
            "shows a running run",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what neither a registered model nor one of the last runs needs.

    A local store moves it to the folder .trash, from which the first gc after a day deletes it. An object store deletes
    it immediately.

    \b
    Examples:
      edt gc --dry-run
      edt gc --keep-runs 5 --yes
      edt gc --empty-trash --yes
    """
    from edt_core.store.store import Store
    from pipelines.registry.cleaning import Request, collect, plan

    if not (dry_run or yes or sys.stdin.isatty()):
        raise UserError(
            "gc asks before it removes anything, but there is no terminal; use --yes to remove without asking, or "
            "--dry-run to list what would be removed"
        )
    catalog, place = open_catalog(store, tracking_uri), Store.open(store)
    request = Request(keep_runs, force, empty_trash)
    if dry_run:
        _show(plan(place, catalog, request), as_json)
        return
    removed = collect(place, catalog, request, None if yes else lambda proposal: _ask(proposal, place, as_json))
    _show_removed(removed, as_json, listed=not yes)
    if removed.failed:
        raise typer.Exit(1)


def _ask(proposal: "Plan", store: "Store", as_json: bool) -> None:
    """Ask for confirmation of a plan, unless it is empty. If the answer is no, exit with 1."""
    if not as_json:
        _show(proposal, False)
    parts = []
    if proposal.garbage:
        verb = "permanently delete" if store.root.local is None else "move to the trash"
        parts.append(f"{verb} {_count(proposal.garbage)}")
    if proposal.discarded:
        parts.append(f"delete from the trash {_count(proposal.discarded)}")
    if parts:
        question = " and ".join(parts)
        typer.confirm(f"{question[0].upper()}{question[1:]} in {store.root.uri}?", abort=True, err=True)


def _show(proposal: "Plan", as_json: bool) -> None:
    """Print what would be removed."""
    if as_json:
        print_json(_as_json(proposal))
        return
    _show_folders(proposal)
    if proposal.garbage:
        say(f"{_count(proposal.garbage)} would be removed")
    if proposal.discarded:
        say(f"{_count(proposal.discarded)} would be deleted from the trash")


def _show_removed(removed: "Removed", as_json: bool, listed: bool) -> None:
    """Print what was removed. With `listed`, the folders were already listed."""
    for path, reason in removed.failed.items():
        say(f"not removed: {_shown(path)}: {_shown(reason)}", err=True)
    if as_json:
        print_json({**_as_json(removed), "trash": removed.trash if removed.garbage else None})
        return
    if not listed:
        _show_folders(removed)
    if removed.garbage:
        where = "deleted" if removed.trash is None else f"moved to {_shown(removed.trash)}; gc deletes it after a day"
        say(f"{_count(removed.garbage)} {where}")
    if removed.discarded:
        say(f"{_count(removed.discarded)} deleted from the trash")


def _show_folders(plan: "Plan") -> None:
    rows = [item.as_row() for item in plan.garbage]
    print_rows(
        rows, ("kind", "fingerprint", "bytes", "why", "attempt"), False, none="nothing to remove", extra=("attempt",)
    )
    if plan.lineage.versions:
        say(f"kept: {_lineage(plan.lineage)}")
    if plan.left_alone:
        say("left alone:")
    for path, reason in plan.left_alone.items():
        say(f"  {_shown(path)}: {_shown(reason)}")


def _as_json(plan: "Plan") -> dict[str, Any]:
    return {
        "garbage": [item.as_row() for item in plan.garbage],
        "deleted_from_trash": [asdict(item) for item in plan.discarded],
        "kept": asdict(plan.lineage),
        "left_alone": [{"path": redacted(path), "why": redacted(why)} for path, why in plan.left_alone.items()],
        "trash": None,
    }


def _lineage(lineage: "Lineage") -> str:
    from pipelines.setup.disk import size_text

    versions = "1 registered version" if lineage.versions == 1 else f"{lineage.versions} registered versions"
    return f"{lineage.artifacts} artifacts ({size_text(lineage.bytes)}) of the lineage of {versions}"


def _count(items: "Sequence[Garbage] | Sequence[Discarded]") -> str:
    from pipelines.setup.disk import size_text

    return f"{len(items)} folder{'s' if len(items) > 1 else ''} ({size_text(sum(item.bytes for item in items))})"


def _shown(text: str) -> str:
    """Text for a terminal: on one line, control characters escaped, credentials hidden."""
    return redacted(on_one_line(text))
