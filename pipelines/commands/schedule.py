"""Commands on schedules: record, list, pause, resume and remove them, and serve those of a store."""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from edt_core.errors import UserError
from edt_core.printing.console import say
from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    Assignments,
    ConfigStore,
    StoreOption,
    print_rows,
    shipped,
)

if TYPE_CHECKING:
    from pipelines.schedule.record import Schedules

_COLUMNS = ("name", "config", "cron", "timezone", "next", "state", "tick", "outcome", "run")
_REFUSED = "refused"


class _WithDefault(TyperGroup):
    """A group in which `edt schedule CONFIG ...` means `edt schedule add CONFIG ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["add", *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    cls=_WithDefault,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a pipeline at the times of a cron expression: CONFIG --cron '0 3 * * 0'.",
)
Name = Annotated[str, typer.Argument(help="name of the schedule")]


@app.command()
def add(
    cron: Annotated[
        str, typer.Option("--cron", help="minute hour day-of-month month day-of-week, such as '0 3 * * 0'")
    ],
    config: Annotated[
        str | None, typer.Argument(help="name of a shipped configuration, or a YAML file", autocompletion=shipped)
    ] = None,
    retrain: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="in place of CONFIG: retrain the champion of this model, as `edt retrain`"),
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(help="time zone of the cron expression, such as Europe/Berlin  \\[default: this machine's]"),
    ] = None,
    when_data_changed: Annotated[
        bool, typer.Option("--when-data-changed", help="run only if the images changed since the last finished run")
    ] = False,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    name: Annotated[
        str | None, typer.Option(help="name of the schedule  \\[default: name of the configuration]")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster that the runs join  \\[default: RAY_ADDRESS, or this machine]")
    ] = None,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="only record the schedule; do not serve it")] = False,
) -> None:
    """Record a schedule (the word `add` is optional) and serve those of the store.

    \b
    Examples:
      edt schedule quickstart --cron '0 3 * * 0' --when-data-changed
      edt schedule edt.yaml --cron '30 1 * * *' --timezone Europe/Berlin --name nightly --no-serve
      edt schedule --retrain edt-tiny-digits-32 --cron '0 3 * * *' --no-serve
    """
    from edt_core.store.store import Store
    from pipelines.schedule.lease import Taken
    from pipelines.schedule.record import Schedules, new_schedule

    subject = retrain or config
    if subject is None or (retrain and config):
        raise UserError("edt schedule takes either a configuration or --retrain MODEL, and got both or none of them")
    if retrain is not None:
        subject = _model_to_retrain(retrain)
    schedule = new_schedule(
        *(name, subject, assignments, store, cron, timezone, when_data_changed, address), retrain=retrain is not None
    )
    Store.open(schedule.store)
    schedules = Schedules.at(schedule.store)
    change = schedules.put(schedule)
    recorded = schedules.read(schedule.name)
    say(f"schedule {schedule.name} is {change}; {'it is paused' if recorded.paused else f'next {_next(recorded)}'}")
    if no_serve:
        say(f"it runs only while a server runs: edt schedule serve --store {shlex.quote(schedule.store)}")
        return
    try:
        _serve(schedules)
    except Taken as error:
        say(f"a server is already running ({error})")


def _model_to_retrain(text: str) -> str:
    """The name of a model; also of NAME@champion. Raises UserError for another version of it."""
    from pipelines.registry.aliases import CHAMPION
    from pipelines.registry.lookup import parts_of

    name, alias, number = parts_of(text)
    if number is not None or alias not in (None, CHAMPION):
        raise UserError(f"--retrain {text}: a schedule retrains the champion; write --retrain {name}")
    return name


@app.command("list")
def list_(store: StoreOption = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List schedules: their next tick, and the outcome of the last one.

    \b
    Examples:
      edt schedule list --json
    """
    from pipelines.schedule.record import Schedules

    schedules = Schedules.at(store)
    rows = [_row(schedules, name) for name in schedules.names()]
    print_rows(rows, _COLUMNS, as_json, "no schedules", extra=("run", "timezone", "tick"))
    if any(row["state"] == _REFUSED for row in rows):
        raise typer.Exit(2)


@app.command()
def pause(name: Name, store: StoreOption = DEFAULT_STORE) -> None:
    """Pause a schedule: it starts no runs until it is resumed.

    \b
    Examples:
      edt schedule pause nightly
    """
    from pipelines.schedule.record import Schedules

    Schedules.at(store).pause(name)
    say(f"schedule {name} is paused; `edt schedule resume {name}` resumes it")


@app.command()
def resume(name: Name, store: StoreOption = DEFAULT_STORE) -> None:
    """Resume a paused schedule at its next tick.

    \b
    Examples:
      edt schedule resume nightly
    """
    from pipelines.schedule.record import Schedules

    schedules = Schedules.at(store)
    schedules.resume(name)
    say(f"schedule {name} is resumed; next {_next(schedules.read(name))}")


@app.command()
def remove(name: Name, store: StoreOption = DEFAULT_STORE) -> None:
    """Remove a schedule. A run in progress and the records of its ticks stay.

    \b
    Examples:
      edt schedule remove nightly
    """
    from pipelines.schedule.record import Schedules

    Schedules.at(store).remove(name)
    say(f"schedule {name} is removed; a run in progress continues, and the records of its ticks stay")


@app.command()
def serve(store: StoreOption = DEFAULT_STORE) -> None:
    """Run all schedules of a store in the foreground until Ctrl-C or SIGTERM.

    \b
    Examples:
      edt schedule serve --store /shared/edt-store
    """
    from edt_core.store.store import Store
    from pipelines.schedule.lease import Taken
    from pipelines.schedule.record import Schedules

    Store.open(store)
    try:
        _serve(Schedules.at(store))
    except Taken as error:
        raise UserError(
            f"another server already serves the schedules of {store} ({error}); stop it first, or let it run"
        ) from None


def _serve(schedules: "Schedules") -> None:
    from pipelines.schedule.server import Server

    raise typer.Exit(Server(schedules, lambda text: say(text)).serve())


def _next(schedule: Any) -> str:
    from datetime import UTC, datetime

    return str(schedule.times.after(datetime.now(UTC)).isoformat(timespec="minutes"))


def _row(schedules: "Schedules", name: str) -> Mapping[str, Any]:
    try:
        schedule, state = schedules.read(name), schedules.state(name)
    except UserError as error:  # the other schedules are still served
        say(f"{name} is refused: {error}", err=True)
        return {"name": name, "state": _REFUSED, "error": str(error)}
    if schedule.paused:
        status = "paused"
    elif state.running:
        status = f"running since {state.running.started.isoformat(timespec='seconds')}"
    else:
        status = "waiting"
    last = state.last
    return {
        **schedule.model_dump(mode="json", exclude={"paused", "since"}),
        "next": None if schedule.paused else _next(schedule),
        "state": status,
        "tick": last and last.tick.isoformat(timespec="minutes"),
        "outcome": last and last.outcome,
        "run": last and last.run,
        "error": last and last.error,
        "log": last and last.log,
    }
