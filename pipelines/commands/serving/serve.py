"""`edt serve`: a registered model over HTTP on Ray Serve, until it is stopped."""

from typing import Annotated

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from pipelines.commands.options import DEFAULT_STORE, StoreOption, TrackingUri


def serve(
    model: Annotated[
        str, typer.Argument(help="NAME@ALIAS is followed when the alias moves; NAME means its champion; or NAME/NUMBER")
    ],
    host: Annotated[str, typer.Option(help="address to listen on; only loopback keeps others out")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: GPUs if Ray has any")] = "auto",
    num_replicas: Annotated[
        int | None, typer.Option(min=1, help="copies of the model  \\[default: one a GPU, or 1]")
    ] = None,
    num_cpus: Annotated[
        float | None, typer.Option(min=1, help="CPUs of a replica  \\[default: 1 beside a GPU, else all, shared]")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="images of a batch; every batch is filled up to it, so all round the same way")
    ] = 8,
    max_queue: Annotated[int, typer.Option(min=1, help="requests that may wait; more are refused with 503")] = 64,
    max_labels: Annotated[int, typer.Option(min=1, help="labels that a request may have")] = 64,
    max_steps: Annotated[int, typer.Option(min=2, help="sampling steps that a request may ask for")] = 1000,
    poll: Annotated[float, typer.Option(min=0.1, help="seconds between two look-ups of the alias")] = 10.0,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join  \\[default: RAY_ADDRESS, or this machine]")
    ] = None,
) -> None:
    """Serve a registered model over HTTP on Ray Serve, until Ctrl-C or SIGTERM.

    \b
    Examples:
      edt serve edt-s-2-256@champion
      edt serve edt-s-2-256@champion --host 0.0.0.0 --port 8080 --batch-size 32
      edt serve edt-tiny-digits-32/2 --device cpu --num-replicas 2 --num-cpus 4
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {device!r}; use auto, cpu or cuda")
    from jobs.serve.app import Limits
    from jobs.serve.session import Options, check_installed, resources, serving, wait_for_interrupt
    from pipelines.cluster.ui import free_port

    check_installed()
    uri = _checked_model(model, store, tracking_uri)
    free_port(host, port, or_else="")
    import ray

    from jobs.runtime.cluster import connect
    from jobs.runtime.reach import check_server

    say("starting Ray Serve ...", err=True)
    try:
        connect(address)
        check_server(uri, "MLFLOW_TRACKING_URI")
        copies, cpus, gpus = resources(device, num_replicas, num_cpus)
        limits = Limits(max_labels, max_steps)
        options = Options(model, uri, host, port, limits, batch_size, max_queue, poll, copies, cpus, gpus)
        with serving(options) as version:
            say(f"http://{host}:{port}  {version.label}, {copies} x {'GPU' if gpus else f'{cpus:g} CPU'}")
            say("POST /sample, GET /health, /metrics, /docs; press Ctrl-C to stop")
            try:
                wait_for_interrupt()
            except KeyboardInterrupt:
                say("stopping: requests that run are answered first", err=True)
    except KeyboardInterrupt:
        pass
    finally:
        ray.shutdown()
    say("stopped", err=True)


def _checked_model(model: str, store: str, tracking_uri: str | None) -> str:
    """The tracking URI where the model is registered, valid in other processes. Raises UserError if it is not."""
    import mlflow

    from jobs.models.names import is_of_mlflow, split_name
    from jobs.models.open import use_mlflow
    from jobs.runtime.tracking import sqlite_path, sqlite_uri
    from jobs.serve.version import find_version

    if split_name(model) is None or not is_of_mlflow(model):
        raise UserError(f"{model} is no registered model; use NAME@ALIAS or NAME/NUMBER (edt models list shows them)")
    use_mlflow(model, tracking_uri, store)
    find_version(model)
    uri: str = mlflow.get_tracking_uri()
    path = sqlite_path(uri)
    return uri if path is None else sqlite_uri(path.absolute())
