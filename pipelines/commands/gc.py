"""edt gc: what goes is listed, agreed on, and then moved to the trash."""

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
    from pipelines.registry.garbage import Garbage


def gc(
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    keep_runs: Annotated[int, typer.Option(min=1, help="keep what each pipeline's last runs are about")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would go, and remove nothing")] = False,
    empty_trash: Annotated[
        bool, typer.Option("--empty-trash", help="delete from the trash what went there less than a day ago, too")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing: remove what is found")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="remove also what this MLflow does not know or nobody can read; on a remote store, whatever MLflow "
            "says is running",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what no registered model and none of the last runs needs.

    It goes to the folder .trash of a local store, and is deleted by the first gc after a day. From an object store it
    is deleted at once.

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
            "gc asks before it removes anything, and this is no terminal to ask on; give --yes to remove what it "
            "finds, or --dry-run to list it"
        )
    catalog, place = open_catalog(store, tracking_uri), Store.open(store)
    request = Request(keep_runs, force, empty_trash)
    if dry_run:
        _show(plan(place, catalog, request), as_json)
        return
    done = collect(place, catalog, request, None if yes else lambda planned: _ask(planned, place, as_json))
    _show_removed(done, as_json, seen=not yes)
    if done.failed:
        raise typer.Exit(1)


def _ask(planned: "Plan", store: "Store", as_json: bool) -> None:
    """Ask whether a plan may be carried out, unless it is empty. Where it may not, the process ends with 1."""
    if not as_json:
        _show(planned, False)
    parts = []
    if planned.garbage:
        verb = "delete for good" if store.root.local is None else "move to the trash"
        parts.append(f"{verb} {_count(planned.garbage)}")
    if planned.discarded:
        parts.append(f"delete from the trash {_count(planned.discarded)}")
    if parts:
        question = " and ".join(parts)
        typer.confirm(f"{question[0].upper()}{question[1:]} in {store.root.uri}?", abort=True, err=True)


def _show(planned: "Plan", as_json: bool) -> None:
    """What would go."""
    if as_json:
        print_json(_as_json(planned))
        return
    _show_folders(planned)
    if planned.garbage:
        say(f"{_count(planned.garbage)} would go")
    if planned.discarded:
        say(f"{_count(planned.discarded)} would be deleted from the trash")


def _show_removed(done: "Removed", as_json: bool, seen: bool) -> None:
    """What went; `seen`: the folders were listed before."""
    for path, reason in done.failed.items():
        say(f"not removed: {_shown(path)}: {_shown(reason)}", err=True)
    if as_json:
        print_json({**_as_json(done), "trash": done.trash if done.garbage else None})
        return
    if not seen:
        _show_folders(done)
    if done.garbage:
        where = "deleted" if done.trash is None else f"moved to {_shown(done.trash)}; gc deletes it after a day"
        say(f"{_count(done.garbage)} {where}")
    if done.discarded:
        say(f"{_count(done.discarded)} deleted from the trash")


def _show_folders(found: "Plan") -> None:
    rows = [item.as_row() for item in found.garbage]
    print_rows(rows, ("kind", "fingerprint", "bytes", "why", "attempt"), False, none="nothing to remove")
    if found.left_alone:
        say("left alone:")
    for path, reason in found.left_alone.items():
        say(f"  {_shown(path)}: {_shown(reason)}")


def _as_json(found: "Plan") -> dict[str, Any]:
    return {
        "garbage": [item.as_row() for item in found.garbage],
        "deleted_from_trash": [asdict(item) for item in found.discarded],
        "left_alone": [{"path": redacted(path), "why": redacted(why)} for path, why in found.left_alone.items()],
        "trash": None,
    }


def _count(items: "Sequence[Garbage] | Sequence[Discarded]") -> str:
    from pipelines.setup.disk import size_text

    return f"{len(items)} folder{'s' if len(items) > 1 else ''} ({size_text(sum(item.bytes for item in items))})"


def _shown(text: str) -> str:
    """A name as a terminal can take it: control characters are escaped."""
    return redacted(on_one_line(text))
