"""edt submit: run pipelines as jobs of a Ray cluster."""

import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say, without_colours
from pipelines.commands.options import AsJson, Assignments, ConfigStore, print_rows

if TYPE_CHECKING:
    from pipelines.cluster.submission import Cluster

_COLUMNS = ("job", "pipeline", "status", "started", "ended", "store")


def submit(
    config: Annotated[
        str | None, typer.Argument(help="name of a shipped configuration, or a YAML file", show_default=False)
    ] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="address of the cluster's dashboard")
    ] = "http://127.0.0.1:8265",
    job_id: Annotated[str | None, typer.Option(help="name of the new job  \\[default: chosen by Ray]")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="submit the job without following its log")] = False,
    follow: Annotated[
        str | None, typer.Option(metavar="JOB", help="follow the log of an earlier job from its start")
    ] = None,
    stop: Annotated[str | None, typer.Option(metavar="JOB", help="stop a job so that it can be resumed")] = None,
    list_: Annotated[bool, typer.Option("--list", help="list the pipelines submitted to this cluster")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline as a job of a Ray cluster; Ctrl-C stops following, not the job.

    \b
    Examples:
      edt submit quickstart --address http://127.0.0.1:8265
      edt submit --list --address http://127.0.0.1:8265
    """
    from pipelines.cluster.submission import Cluster, request_for
    from pipelines.config.schema import load_config

    actions = [config is not None, follow is not None, stop is not None, list_]
    if sum(actions) != 1:
        raise UserError("use exactly one of CONFIG, --follow JOB, --stop JOB and --list")
    if config is not None:
        command = _command(config, assignments, store, address)
        request = request_for(load_config(config, assignments, store), address, os.environ, command)
        cluster = Cluster(address)
        for note in request.notes:
            say(f"note: {note}", err=True)
        job = cluster.submit(request, job_id)
        say(f"submitted {job}")
        if detach:
            say(_how_to_return(job, address))
        else:
            _follow(cluster, job)
    elif follow is not None:
        _follow(Cluster(address), follow)
    elif stop is not None:
        cluster = Cluster(address)
        was_running = cluster.stop(stop)
        say(f"{stop} stops; finished work is kept" if was_running else f"{stop} has already ended")
        _show_resume(cluster, stop)
    else:
        none = "no pipelines were submitted to this cluster"
        print_rows(Cluster(address).jobs(), _COLUMNS, as_json, none, extra=("ended", "store"))


def _follow(cluster: "Cluster", job: str) -> None:
    """Print a job's log to its end, then exit with 0 if it succeeded and 1 if not."""
    try:
        status, message = cluster.follow(job, lambda text: say(without_colours(text), nl=False))
    except KeyboardInterrupt:
        say(f"\n{job} continues in the cluster\n{_how_to_return(job, cluster.address)}")
        raise typer.Exit(130) from None
    succeeded = status == "SUCCEEDED"
    reason = "" if succeeded else f": {message.strip().splitlines()[0] if message.strip() else 'no reason given'}"
    say(f"{job} {status}{reason}")
    if not succeeded:
        _show_resume(cluster, job)
    raise typer.Exit(0 if succeeded else 1)


def _command(config: str, assignments: Sequence[str], store: str | None, address: str) -> str:
    """The command that submits the same pipeline again, without the job's name, which Ray accepts only once."""
    options = [part for text in assignments for part in ("--set", text)]
    options += ["--store", store] if store is not None else []
    return shlex.join(["edt", "submit", config, *options, "--address", address])


def _show_resume(cluster: "Cluster", job: str) -> None:
    if command := cluster.resume_command(job):
        say(f"to resume   {command}")


def _how_to_return(job: str, address: str) -> str:
    follow, stop = (shlex.join(["edt", "submit", what, job, "--address", address]) for what in ("--follow", "--stop"))
    return f"to follow   {follow}\nto stop     {stop}"
