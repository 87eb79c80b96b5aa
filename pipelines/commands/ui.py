"""edt ui: the runs, metrics and models of a store in a browser."""

from pathlib import Path
from typing import Annotated, Any

import typer

from edt_core.printing.console import say
from pipelines.commands.options import DEFAULT_STORE, StoreOption, TrackingUri, open_catalog

_RUNS = 5


def ui(
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    run: Annotated[str | None, typer.Option(metavar="ID", help="open at this run, as `edt runs` lists them")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; others than loopback let others in")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 for any  \\[default: 5000, or the next free one]")
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="print the links, and open no browser")] = False,
) -> None:
    """Show the runs, metrics and models of a store in MLflow's UI, until Ctrl-C.

    \b
    Examples:
      edt ui
      edt ui --store /data/edt-store --port 5001
      edt ui --run 3f2a9c41d0e84b6fa1c2d3e4f5a6b7c8 --no-open
    """
    from pipelines.cluster.ui import DEFAULT_PORT, experiment_of, free_port, served

    catalog = open_catalog(store, tracking_uri)
    experiment = experiment_of(catalog, run) if run else None
    if catalog.tracking_uri.startswith(("http://", "https://")):
        _tell(catalog.tracking_uri, catalog, run, experiment, not no_open)
        return
    chosen = free_port(host, port)
    if port is None and chosen != DEFAULT_PORT:
        say(f"port {DEFAULT_PORT} is taken: using {chosen}", err=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(f"warning: anyone who reaches {host}:{chosen} can read and change all of it: MLflow asks nobody", err=True)
    folder = _folder(catalog.tracking_uri, store)
    say("starting MLflow ...", err=True)
    try:
        with served(catalog.tracking_uri, folder / "mlartifacts", host, chosen) as (url, process):
            _tell(url, catalog, run, experiment, not no_open)
            say("Ctrl-C ends it")
            code = process.wait()
            say(f"the MLflow server ended by itself with code {code}", err=True)
            raise typer.Exit(1)
    except KeyboardInterrupt:
        say("stopped", err=True)


def _folder(tracking_uri: str, store: str) -> Path:
    """Where the server works: beside its SQLite file, or, with another database, in the store."""
    from edt_core.errors import UserError
    from edt_core.store.folder import Folder
    from jobs.runtime.tracking import sqlite_path

    if (database := sqlite_path(tracking_uri)) is not None:
        return database.parent.absolute()
    if (root := Folder.at(store).local) is None or not root.is_dir():
        raise UserError(f"no server is at {tracking_uri}, and {store} is no local folder to start one in; give --store")
    return root


def _tell(url: str, catalog: Any, run: str | None, experiment: str | None, wanted: bool) -> None:
    """Print the links, and open a browser at the one that was asked for."""
    import webbrowser

    from edt_core.printing.redaction import redacted
    from pipelines.cluster.ui import has_display, last_runs, run_link

    first = run_link(url, experiment, run) if run and experiment else redacted(url)
    say(first)
    for row in [] if run else last_runs(catalog, _RUNS):
        say(f"  {row['pipeline']} {row['status']}  {run_link(url, row['experiment'], row['run'])}")
    if wanted and has_display():
        webbrowser.open(first)
