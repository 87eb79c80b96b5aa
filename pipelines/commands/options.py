"""Arguments and options that several commands share, and the printing of tables."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.printing.console import say
from edt_core.printing.table import screen_width, table_lines

if TYPE_CHECKING:
    from pipelines.tracking.catalog import Catalog

DEFAULT_STORE = "./edt-store"


def shipped(incomplete: str) -> list[str]:
    """Names of shipped configurations for shell completion. It only lists the package's files, which is quick."""
    from importlib.resources import files

    names = (entry.name.removesuffix(".yaml") for entry in files("pipelines").joinpath("configs").iterdir())
    return sorted(name for name in names if name.startswith(incomplete))


Config = Annotated[str, typer.Argument(help="name of a shipped configuration, or a YAML file", autocompletion=shipped)]
Assignments = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="set one field, such as train.max_steps=50; repeatable"),
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
    """The MLflow of a store or server, for reading. Raises UserError if it is missing or does not answer."""
    import os

    from edt_core.store.folder import Folder
    from pipelines.tracking.catalog import Catalog

    # The defaults retry for minutes while a person waits.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    return Catalog.existing(Folder.at(store), tracking_uri)


def catalog_if_any(store: str) -> "Catalog | None":
    """The MLflow of a store, or None if the store has none yet."""
    from pipelines.tracking.catalog import NoRecordError

    try:
        return open_catalog(store, None)
    except NoRecordError:
        return None


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    as_json: bool,
    none: str = "none",
    extra: Sequence[str] = (),
) -> None:
    """Print rows as a table of these columns, or as a JSON list of all fields. Without rows, the table is `none`.

    A narrow terminal leaves out columns, first those in `extra`.
    """
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        say(none)
        return
    for line in table_lines(rows, columns, screen_width(), extra):
        say(line)


def print_json(value: Any) -> None:
    """Print a value as JSON for programs, with sorted keys and one field a line."""
    say(json.dumps(value, indent=1, sort_keys=True))
