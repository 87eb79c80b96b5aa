"""Commands that run a pipeline, or tell what a run would do or did: run, configs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.errors import UserError
from pipelines.commands.options import Assignments, Config, ConfigStore

if TYPE_CHECKING:
    from pipelines.config import PipelineConfig
    from pipelines.workflows import Outcome


def run(
    config: Config = "quickstart",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join  [default: RAY_ADDRESS, or this machine]")
    ] = None,
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
        if outcome.stopped:
            terminal.say(f"\n{outcome.stopped}; what is finished is kept, run again to go on", "yellow")
            raise typer.Exit(130)
        show_outcome(outcome, terminal)
    if outcome.failures:
        raise typer.Exit(2 if all(isinstance(e, UserError) for e in outcome.failures.values()) else 1)


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


def configs(
    name: Annotated[str | None, typer.Argument(help="show this one, defaults included")] = None,
) -> None:
    """List the configurations that ship with the package, or show one."""
    from pipelines.config import as_yaml, config_names, load_config

    typer.echo(as_yaml(load_config(name)) if name else "\n".join(config_names()))


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


def error_text(error: BaseException) -> str:
    """What to print of an error: a user's own mistake without its type, a fault of ours with it."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
