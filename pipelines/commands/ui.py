"""edt ui: show the runs, metrics and models of a store in a browser."""

from pathlib import Path
from typing import Annotated, Any

import typer

from edt_core.printing.console import say
from pipelines.commands.options import DEFAULT_STORE, StoreOption, TrackingUri, open_catalog

_RUNS = 5


def ui(
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    run: Annotated[str | None, typer.Option(metavar="ID", help="open at this run, as listed by `edt runs`")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; only loopback keeps others out")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="port to listen on, 0 for any  \\[default: 5000, or the next free one]"),
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="print the links without opening a browser")] = False,
) -> None:
    """Show the runs, metrics and models of a store in MLflow's UI, until Ctrl-C.

    \b
    Examples:
      edt ui
      edt ui --store /data/edt-store --port 5001
      edt ui --run 3f2a9c41d0e84b6fa1c2d3e4f5a6b7c8 --no-open
    """
    from pipelines.cluster.ui import DEFAULT_PORT, experiment_of, free_port, served
    from pipelines.tracking.runs import whole_run_id

    catalog = open_catalog(store, tracking_uri)
    run = (whole_run_id(catalog, run) or run) if run else None
    experiment = experiment_of(catalog, run) if run else None
    if catalog.tracking_uri.startswith(("http://", "https://")):
        _show_links(catalog.tracking_uri, catalog, run, experiment, not no_open)
        return
    number = free_port(host, port)
    if port is None and number != DEFAULT_PORT:
        say(f"port {DEFAULT_PORT} is in use: using {number}", err=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(
            f"warning: anyone who reaches {host}:{number} can read and change everything: MLflow has no login here",
            err=True,
        )
    folder = _folder(catalog.tracking_uri, store)
    say("starting MLflow ...", err=True)
    try:
        with served(catalog.tracking_uri, folder / "mlartifacts", host, number) as (url, process):
            _show_links(url, catalog, run, experiment, not no_open)
            say("press Ctrl-C to stop")
            code = process.wait()
            say(f"the MLflow server exited unexpectedly with code {code}", err=True)
            raise typer.Exit(1)
    except KeyboardInterrupt:
        say("stopped", err=True)


def _folder(tracking_uri: str, store: str) -> Path:
    """The folder for the server's files: that of its SQLite file, or the store if it has another database."""
    from edt_core.errors import UserError
    from edt_core.store.folder import Folder
    from jobs.runtime.tracking import sqlite_path

    if (database := sqlite_path(tracking_uri)) is not None:
        return database.parent.absolute()
    if (root := Folder.at(store).local) is None or not root.is_dir():
        raise UserError(
            f"cannot start an MLflow server for {tracking_uri}: {store} is no local folder; set --store to one"
        )
    return root


def _show_links(url: str, catalog: Any, run: str | None, experiment: str | None, browse: bool) -> None:
    """Print the links. With `browse`, also open the first one in a browser."""
    import webbrowser

    from edt_core.printing.redaction import redacted
    from pipelines.cluster.ui import has_display, last_runs, run_link

    first = run_link(url, experiment, run) if run and experiment else redacted(url)
    say(first)
    for row in [] if run else last_runs(catalog, _RUNS):
        say(f"  {row['pipeline']} {row['status']}  {run_link(url, row['experiment'], row['run'])}")
    if browse and has_display():
        webbrowser.open(first)
