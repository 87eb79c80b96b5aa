"""Commands that run a pipeline, or tell what a run would do or did: run, plan, runs, reproduce."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.errors import UserError
from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    Assignments,
    Config,
    ConfigStore,
    StoreOption,
    TrackingUri,
    catalog_if_any,
    open_catalog,
    print_rows,
)

if TYPE_CHECKING:
    from pipelines.config import PipelineConfig
    from pipelines.workflows import Outcome

Address = Annotated[str | None, typer.Option(help="Ray cluster to join  [default: RAY_ADDRESS, or this machine]")]


def run(
    config: Config = "quickstart",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    address: Address = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="tell what the trainings would take, and start nothing")
    ] = False,
    no_overlap: Annotated[
        bool, typer.Option("--no-overlap", help="start nothing while a run of this pipeline goes on in this store")
    ] = False,
) -> None:
    """Run the whole pipeline; what is already made is reused."""
    from pipelines.config import load_config
    from pipelines.schedule import tell_scheduler
    from pipelines.terminal import Terminal
    from pipelines.workflows import run as run_pipeline

    loaded = load_config(config, assignments, store)
    if dry_run:
        from pipelines.dry_run import dry_run as told

        typer.echo(told(loaded))
        return
    with _alone(loaded, no_overlap), Terminal() as terminal:
        terminal.say(f"edt run {loaded.name}", "bold")
        try:
            outcome = run_pipeline(loaded, terminal, address)
        except KeyboardInterrupt:
            terminal.say("\nstopped; what is finished is kept, run again to go on", "yellow")
            raise typer.Exit(130) from None
        ended = "stopped" if outcome.stopped else "failed" if outcome.failures else "finished"
        tell_scheduler(ended, outcome.run_id)
        _fail_if_stopped(outcome)
        show_outcome(outcome, terminal)
    if outcome.failures:
        raise typer.Exit(exit_code(outcome))


@contextmanager
def _alone(config: "PipelineConfig", wanted: bool) -> Iterator[None]:
    """Where it is wanted, keep other runs of the pipeline away from its store, or leave with exit code 0 for theirs."""
    from pipelines.lease import Taken, held, this_process
    from pipelines.schedule import OVERLAP, run_lease, tell_scheduler

    if not wanted:
        yield
        return
    from pipelines.artifacts import Store

    try:
        with held(Store.open(config.store).root, run_lease(config.name), this_process(), on_lost=_warn_of_loss):
            yield
    except Taken as taken:
        tell_scheduler(OVERLAP)
        typer.echo(f"a run of {config.name} in {config.store} is going on ({taken}); nothing was started")
        raise typer.Exit(0) from None


def _warn_of_loss() -> None:
    typer.echo("warning: this run was taken for dead, and another one of its pipeline may go on beside it", err=True)


def show_outcome(outcome: "Outcome", terminal: Any) -> None:
    """The end of a run: failures, or where everything is."""
    from edt_core.metrics import in_order
    from edt_core.schema import REPORT_NAME, SAMPLES_NAME

    terminal.say(
        f"\n{outcome.reused} steps reused, {outcome.executed} run, {len(outcome.failures)} failed "
        f"in {outcome.seconds:.0f} s"
    )
    for name, decision in outcome.decisions.items():
        before, after = outcome.metrics[name]
        terminal.say(f"\n{name} version {decision.version}  {decision}", "bold")
        for metric in in_order(after):
            value = after[metric]
            if metric.endswith("_std") and metric.removesuffix("_std") in after:
                continue
            spread = f" ± {after[f'{metric}_std']:.2g}" if f"{metric}_std" in after else ""
            terminal.say(f"  {metric:<20} {value:>10.4g}{spread}   untrained {before[metric]:.4g}")
    for report in outcome.reports.values():
        terminal.say(f"\nsamples   {report.path(SAMPLES_NAME)}")
        terminal.say(f"report    {report.path(REPORT_NAME)}")
    terminal.say(f"MLflow    {outcome.tracking_uri}  run {outcome.run_id}")
    if outcome.tracking_uri.startswith("sqlite:"):
        terminal.say(f"          mlflow ui --backend-store-uri {outcome.tracking_uri}")
    for name, error in outcome.failures.items():
        terminal.say(f"\nerror: {name}: {error_text(error)}", "red")


def exit_code(outcome: "Outcome") -> int:
    """2 where the request itself was wrong and nothing came of it, 1 where a step failed."""
    wrong = all(isinstance(error, UserError) for error in outcome.failures.values())
    return 2 if wrong and not outcome.decisions else 1


def _fail_if_stopped(outcome: "Outcome") -> None:
    if outcome.stopped:
        typer.echo(f"\n{outcome.stopped}; what is finished is kept, run again to go on", err=True)
        raise typer.Exit(130)


def _short(row: Mapping[str, Any], *names: str) -> dict[str, str]:
    return {name: (row[name] or "-")[:12] for name in names}


def error_text(error: BaseException) -> str:
    """What to print of an error: a user's own mistake without its type, a fault of ours with it."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def plan(
    config: Config = "quickstart",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    as_json: AsJson = False,
) -> None:
    """Tell of each step whether it would be reused, resumed or run, and why; start nothing."""
    from pipelines.config import load_config
    from pipelines.plan import plan as planned

    loaded = load_config(config, assignments, store)
    rows = [step.as_row() for step in planned(loaded, catalog_if_any(loaded.store))]
    shown = [{**row, "fingerprint": row["fingerprint"][:12], "run": (row["run_id"] or "-")[:8]} for row in rows]
    print_rows(rows if as_json else shown, ("action", "step", "fingerprint", "run", "why"), as_json)


def runs(
    pipeline: Annotated[
        str | None, typer.Argument(help="of this pipeline only, by the name in its configuration")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    limit: Annotated[int, typer.Option(min=1, help="this many, the newest")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the runs of pipelines: what each reused and made, and what failed."""
    from pipelines.runs import run_rows

    rows = run_rows(open_catalog(store, tracking_uri), pipeline, limit)
    columns = ("run", "pipeline", "status", "started", "seconds", "reused", "executed", "failed")
    shown = [{**row, "failed": row["failed"].splitlines()[0][:80] if row["failed"] else ""} for row in rows]
    print_rows(rows if as_json else shown, columns, as_json, none="no runs")


def reproduce(
    run_id: Annotated[str, typer.Argument(help="MLflow id of a pipeline's run, as `edt runs` lists them")],
    into: Annotated[
        str | None, typer.Option(help="empty folder of the new store  [default: ./edt-reproduced-<run>]")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    other_code: Annotated[bool, typer.Option("--other-code", help="go on where the code is another version")] = False,
    as_json: AsJson = False,
) -> None:
    """Do a run again from its MLflow record alone, into a fresh store, and compare every artifact's content."""
    from pipelines.reproduce import reproduce as reproduced
    from pipelines.terminal import Terminal

    catalog = open_catalog(store, tracking_uri)
    with Terminal(to_stderr=True) as terminal:
        outcome, found = reproduced(
            run_id, catalog, into or f"./edt-reproduced-{run_id[:8]}", terminal, address, other_code
        )
    _fail_if_stopped(outcome)
    rows = [comparison.as_row() for comparison in found]
    shown = [{**row, "equal": "yes" if row["equal"] else "NO", **_short(row, "recorded", "now")} for row in rows]
    print_rows(rows if as_json else shown, ("step", "recorded", "now", "equal", "how"), as_json)
    if not as_json:
        typer.echo(f"{sum(row['equal'] for row in rows)} of {len(rows)} artifacts have the recorded content")
    if outcome.failures or not all(row["equal"] for row in rows):
        raise typer.Exit(1)
