"""Arguments and options that several commands share, and how a table is printed."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.printing.console import on_one_line, say

if TYPE_CHECKING:
    from pipelines.tracking.catalog import Catalog

DEFAULT_STORE = "./edt-store"


def shipped(incomplete: str) -> list[str]:
    """Names of shipped configurations, for the shell. Asks the package's files alone: it has to be quick."""
    from importlib.resources import files

    names = (entry.name.removesuffix(".yaml") for entry in files("pipelines").joinpath("configs").iterdir())
    return sorted(name for name in names if name.startswith(incomplete))


Config = Annotated[str, typer.Argument(help="name of a shipped configuration, or a YAML file", autocompletion=shipped)]
Assignments = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="set one field, as train.max_steps=50; repeatable"),
]
ConfigStore = Annotated[
    str | None, typer.Option("--store", help=f"folder or URI of the artifacts  \\[default: {DEFAULT_STORE}]")
]
StoreOption = Annotated[str, typer.Option("--store", help="folder or URI of the artifacts")]
TrackingUri = Annotated[
    str | None,
    typer.Option(help="MLflow server  \\[default: MLFLOW_TRACKING_URI, or the SQLite file in the store]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def open_catalog(store: str, tracking_uri: str | None) -> "Catalog":
    """The MLflow that a look-up reads. Raises UserError where there is none, or a silent one."""
    import os

    from edt_core.store.folder import Folder
    from pipelines.tracking.catalog import Catalog

    # A person waits; the defaults try for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    return Catalog.existing(Folder.at(store), tracking_uri)


def catalog_if_any(store: str) -> "Catalog | None":
    """The MLflow of a store that may be new."""
    from pipelines.tracking.catalog import NoRecordError

    try:
        return open_catalog(store, None)
    except NoRecordError:
        return None


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool, none: str = "none") -> None:
    """Rows as a table of these columns, or all that they hold as a JSON list. `none` is said where there are none."""
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        say(none)
        return
    cells = [list(columns), *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    for line in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(value: Any) -> None:
    """Any value as JSON for programs: sorted keys, one field a line."""
    say(json.dumps(value, indent=1, sort_keys=True))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else on_one_line(str(value))
