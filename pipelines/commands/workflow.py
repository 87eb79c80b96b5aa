"""Commands that run a pipeline, or tell what a run would do or did: run, plan, runs, reproduce."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
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
    print_json,
    print_rows,
)

if TYPE_CHECKING:
    from pipelines.config.schema import PipelineConfig
    from pipelines.outcome import Outcome
    from pipelines.terminal.terminal import Terminal

Address = Annotated[str | None, typer.Option(help="Ray cluster to join  \\[default: RAY_ADDRESS, or this machine]")]


def run(
    config: Config = "quickstart",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    address: Address = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="tell what the trainings would take, and start nothing")
    ] = False,
    no_overlap: Annotated[
        bool,
        typer.Option("--no-overlap", help="start nothing while a run of this pipeline is in progress in this store"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline; what is already made is reused.

    \b
    Examples:
      edt run
      edt run imagenet256-edt-s --set source.path=/data/imagenet/train --dry-run
      edt run edt.yaml --set train.max_steps=5000 --store /shared/edt-store --address auto
    """
    from jobs.runtime.cluster_address import check_named
    from pipelines.config.schema import load_config

    loaded = load_config(config, assignments, store)
    if dry_run:
        from pipelines.setup.dry_run import training_needs

        say(training_needs(loaded))
        return
    check_named(address)  # before the imports below, which take seconds
    from pipelines.cluster.submission import stopped_too_soon
    from pipelines.pipeline import run as run_pipeline
    from pipelines.schedule.record import tell_scheduler

    with _alone(loaded, no_overlap), _logged(loaded.store, "run", to_stderr=as_json) as terminal:
        terminal.say(f"edt run {loaded.name}", "bold")
        if warning := stopped_too_soon(os.environ):
            terminal.warn(warning)
        try:
            outcome = run_pipeline(loaded, terminal, address)
        except KeyboardInterrupt:
            tell_stopped(terminal, "stopped")
            raise typer.Exit(130) from None
        tell_scheduler(outcome.status, outcome.run_id)
        terminal.freeze()
        show_outcome(outcome, terminal)
    if as_json:
        log_path = str(terminal.log.path) if terminal.log is not None else None
        print_json({**outcome.to_dict(), "log": log_path})
    if code := exit_code(outcome):
        raise typer.Exit(code)


@contextmanager
def _logged(store: str, name: str, to_stderr: bool) -> Iterator["Terminal"]:
    """A terminal whose log takes what libraries print, the last words of a Ray session begun here included."""
    from pipelines.terminal.run_log import RunLog
    from pipelines.terminal.terminal import Terminal

    before = _on_ray()
    with RunLog.new(store, name, to_stderr) as log, Terminal(to_stderr, log) as terminal:
        try:
            yield terminal
        finally:
            terminal.freeze()
            if _on_ray() and not before:
                import ray

                ray.shutdown()


def _on_ray() -> bool:
    """Whether this process has joined a Ray session; asks without importing Ray, which takes a second."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@contextmanager
def _alone(config: "PipelineConfig", wanted: bool) -> Iterator[None]:
    """Where it is wanted, keep other runs of the pipeline away from its store, or leave with exit code 0 for theirs."""
    from pipelines.schedule.lease import Taken, hold, this_process
    from pipelines.schedule.record import OVERLAP, run_lease, tell_scheduler

    if not wanted:
        yield
        return
    from edt_core.store.store import Store

    try:
        with hold(Store.open(config.store).root, run_lease(config.name), this_process(), on_lost=_warn_of_loss):
            yield
    except Taken as taken:
        tell_scheduler(OVERLAP)
        say(f"a run of {config.name} in {config.store} is in progress ({taken}); nothing was started")
        raise typer.Exit(0) from None


def _warn_of_loss() -> None:
    say("warning: this run was taken for dead, and another run of its pipeline may be in progress", err=True)


def show_outcome(outcome: "Outcome", terminal: "Terminal") -> None:
    """The end of a run: what is registered and where everything is; of what failed, cause, remedy and log."""
    from edt_core.store.layout import REPORT_NAME, SAMPLES_NAME

    counts = f"{outcome.reused} steps reused, {outcome.executed} run, {len(outcome.failures)} failed"
    terminal.say(f"\n{counts} in {outcome.seconds:.0f} s")
    for name, decision in outcome.decisions.items():
        terminal.say(f"\n{name} version {decision.version}  {decision}", "bold")
        _show_metrics(*outcome.metrics[name], terminal)
    for report in outcome.reports.values():
        terminal.say(f"\nsamples   {report.path(SAMPLES_NAME)}")
        terminal.say(f"report    {report.path(REPORT_NAME)}")
    terminal.say(f"run       {outcome.run_id}")
    terminal.say(f"MLflow    {outcome.link}")
    for name, error in outcome.failures.items():
        _show_failure(name, error, terminal)
    if outcome.stopped:
        tell_stopped(terminal, outcome.stopped)


def _show_metrics(before: Mapping[str, float], after: Mapping[str, float], terminal: "Terminal") -> None:
    from edt_core.evaluation.metrics import in_order

    for metric in in_order(after):
        if metric.endswith("_std") and metric.removesuffix("_std") in after:
            continue
        spread = f" ± {after[f'{metric}_std']:.2g}" if f"{metric}_std" in after else ""
        terminal.say(f"  {metric:<20} {after[metric]:>10.4g}{spread}   untrained {before[metric]:.4g}")


def _show_failure(step: str, error: BaseException, terminal: "Terminal") -> None:
    from jobs.runtime.failure import explained

    failure = explained(error)
    terminal.say("")
    terminal.tell(f"error: {step}: {failure.cause}", "red", indent=7)
    if failure.remedy:
        terminal.tell(f"       {failure.remedy}", indent=7)
    if terminal.log is not None:
        terminal.say(f"       log: {terminal.log.path}")


def tell_stopped(terminal: "Terminal", how: str) -> None:
    """Say that a run was stopped, and the command that resumes it: of a submitted job, that of its submitter."""
    from pipelines.cluster.submission import GO_ON

    terminal.freeze()
    command = os.environ.get(GO_ON) or shlex.join(["edt", *sys.argv[1:]])
    terminal.say(f"\n{how}; finished work is kept. To resume:\n  {command}", "yellow")


def exit_code(outcome: "Outcome") -> int:
    """130 where it was stopped, 2 where the request was wrong and nothing came of it, 1 where a step failed, or 0."""
    if outcome.stopped:
        return 130
    wrong = all(isinstance(error, UserError) for error in outcome.failures.values())
    return 0 if not outcome.failures else 2 if wrong and not outcome.decisions else 1


def _short(row: Mapping[str, Any], *names: str) -> dict[str, str]:
    return {name: (row[name] or "-")[:12] for name in names}


def plan(
    config: Config = "quickstart",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    as_json: AsJson = False,
) -> None:
    """Tell which steps a run would reuse, resume or run, and why; start nothing.

    \b
    Examples:
      edt plan quickstart --set train.lr=0.001
      edt plan edt.yaml --json
    """
    from pipelines.config.schema import load_config
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
    """List the runs of pipelines: what each reused and made, and what failed.

    \b
    Examples:
      edt runs
      edt runs quickstart --limit 5 --json
    """
    from pipelines.tracking.runs import run_rows

    rows = run_rows(open_catalog(store, tracking_uri), pipeline, limit)
    columns = ("run", "pipeline", "status", "started", "seconds", "reused", "executed", "failed")
    shown = [{**row, "failed": row["failed"].splitlines()[0][:80] if row["failed"] else ""} for row in rows]
    print_rows(rows if as_json else shown, columns, as_json, none="no runs")


def reproduce(
    run_id: Annotated[str, typer.Argument(help="MLflow id of a pipeline's run, as `edt runs` lists them")],
    into: Annotated[
        str | None, typer.Option(help="empty folder of the new store  \\[default: ./edt-reproduced-<run>]")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    other_code: Annotated[
        bool, typer.Option("--other-code", help="continue although the code is another version")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Do a run again from its MLflow record alone, and compare every artifact.

    \b
    Examples:
      edt reproduce 0a1b2c3d4e5f60718293a4b5c6d7e8f9 --into ./again
      edt reproduce 0a1b2c3d4e5f60718293a4b5c6d7e8f9 --tracking-uri http://mlflow:5000 --json
    """
    from jobs.runtime.cluster_address import check_named

    check_named(address)
    from pipelines.reproduce import reproduce as reproduced

    catalog = open_catalog(store, tracking_uri)
    folder = into or f"./edt-reproduced-{run_id[:8]}"
    with _logged(store, "reproduce", to_stderr=True) as terminal:
        outcome, found = reproduced(run_id, catalog, folder, terminal, address, other_code)
        if outcome.stopped:
            tell_stopped(terminal, outcome.stopped)
            raise typer.Exit(130)
        for name, error in outcome.failures.items():
            _show_failure(name, error, terminal)
    rows = [comparison.as_row() for comparison in found]
    shown = [{**row, "equal": "yes" if row["equal"] else "NO", **_short(row, "recorded", "now")} for row in rows]
    print_rows(rows if as_json else shown, ("step", "recorded", "now", "equal", "how"), as_json)
    if not as_json:
        say(f"{sum(row['equal'] for row in rows)} of {len(rows)} artifacts have the recorded content")
    if outcome.failures or not all(row["equal"] for row in rows):
        raise typer.Exit(1)
