"""Commands that run a pipeline, or show what a run would do or did: run, plan, runs, reproduce."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from edt_core.printing.table import fitted, screen_width
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
from pipelines.commands.studies.ladder_cost import show_cost

if TYPE_CHECKING:
    from pipelines.config.schema import NotifyConfig, PipelineConfig
    from pipelines.notification import Notification
    from pipelines.outcome import Outcome
    from pipelines.pipeline import Guard
    from pipelines.terminal.terminal import Terminal

NoOverlap = Annotated[
    bool, typer.Option("--no-overlap", help="start nothing if a run of this pipeline is in progress in this store")
]
DigestAgain = Annotated[
    bool,
    typer.Option("--digest-again", help="read every image of the source, even if its digest is cached"),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join  \\[default: RAY_ADDRESS, or this machine]")]


def run(
    config: Config = "quickstart",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    address: Address = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the resources and the time that training needs, and start nothing")
    ] = False,
    no_overlap: NoOverlap = False,
    digest_again: DigestAgain = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline, and reuse existing artifacts.

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
        from jobs.runtime.cluster_address import named_address
        from pipelines.setup.dry_run import training_needs

        show_cost(loaded)
        say(training_needs(loaded, named_address(address), timed=True))
        return
    with failures_notified(loaded.notify, loaded.name):
        check_named(address)  # before the imports below, which take seconds
    execute(loaded, "run", address, no_overlap, as_json, digest_again=digest_again)


def execute(
    loaded: "PipelineConfig",
    verb: str,
    address: str | None,
    no_overlap: bool,
    as_json: bool,
    notes: Sequence[str] = (),
    tracking_uri: str | None = None,
    digest_again: bool = False,
    guard: "Guard | None" = None,
    news: "Sequence[Notification]" = (),
) -> None:
    """Run a pipeline and show its outcome. `notes` are lines for the beginning. Exits with the code of the outcome.

    `guard`: may hold the run back before its trainings. `news`: sent when the run starts.
    """
    from pipelines.cluster.submission import stopped_too_soon
    from pipelines.notification import notify, of_outcome
    from pipelines.pipeline import run as run_pipeline
    from pipelines.schedule.record import report_to_scheduler

    with (
        failures_notified(loaded.notify, loaded.name),
        _overlap_guard(loaded, no_overlap, "" if verb == "run" else f"-{next(iter(loaded.models))}"),
        logged(loaded.store, verb, to_stderr=as_json) as terminal,
    ):
        terminal.say(f"edt {verb} {loaded.name if verb == 'run' else next(iter(loaded.models))}", "bold")
        for note in notes:
            terminal.say(note)
        notify(loaded.notify, news, terminal.warn)
        if warning := stopped_too_soon(os.environ):
            terminal.warn(warning)
        try:
            outcome = run_pipeline(
                loaded,
                terminal,
                address,
                tracking_uri=tracking_uri,
                digest_again=digest_again,
                guard=guard,
                on_start=partial(report_to_scheduler, None),
            )
        except KeyboardInterrupt:
            show_stopped(terminal, "stopped")
            raise typer.Exit(130) from None
        report_to_scheduler(outcome.status, outcome.run_id)
        terminal.freeze()
        show_outcome(outcome, terminal)
        notify(loaded.notify, of_outcome(loaded.name, outcome), terminal.warn)
    if as_json:
        log_path = str(terminal.log.path) if terminal.log is not None else None
        print_json({**outcome.to_dict(), "log": log_path})
    if code := exit_code(outcome):
        raise typer.Exit(code)


@contextmanager
def failures_notified(config: "NotifyConfig", pipeline: str) -> Iterator[None]:
    """Send a notification of an error that ends the command before the run has an outcome."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        from pipelines.notification import notify, of_error
        from pipelines.schedule.record import report_to_scheduler

        notify(config, [of_error(pipeline, error)], lambda text: say(f"warning: {text}", err=True))
        report_to_scheduler("failed")
        raise


@contextmanager
def logged(store: str, name: str, to_stderr: bool) -> Iterator["Terminal"]:
    """A terminal whose log captures what libraries print, including the end of a Ray session started here."""
    from pipelines.terminal.run_log import RunLog
    from pipelines.terminal.terminal import Terminal

    had_session = _on_ray()
    with RunLog.new(store, name, to_stderr) as log, Terminal(to_stderr, log) as terminal:
        try:
            yield terminal
        finally:
            terminal.freeze()
            if _on_ray() and not had_session:
                import ray

                ray.shutdown()


def _on_ray() -> bool:
    """Whether this process is in a Ray session, without an import of Ray, which takes a second."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@contextmanager
def _overlap_guard(config: "PipelineConfig", no_overlap: bool, part: str) -> Iterator[None]:
    """With `no_overlap`, hold the lease on the pipeline in its store, or exit with code 0 if another run holds it.

    `part` sets the retrainings of a pipeline's models apart: they have leases of their own.
    """
    from pipelines.schedule.lease import Taken, hold, this_process
    from pipelines.schedule.record import OVERLAP, report_to_scheduler, run_lease

    if not no_overlap:
        yield
        return
    from edt_core.store.store import Store

    try:
        with hold(Store.open(config.store).root, run_lease(config.name + part), this_process(), on_lost=_warn_of_loss):
            yield
    except Taken as error:
        report_to_scheduler(OVERLAP)
        say(f"a run of {config.name} in {config.store} is in progress ({error}); nothing was started")
        raise typer.Exit(0) from None


def _warn_of_loss() -> None:
    say("warning: this run lost its lease after a long pause; another run of its pipeline may be in progress", err=True)


def show_outcome(outcome: "Outcome", terminal: "Terminal") -> None:
    """Print the end of a run: registered models, paths and links, and for each failure cause, remedy and log."""
    from edt_core.evaluation.trainings import seeds_text, spread_text
    from edt_core.store.layout import REPORT_NAME, SAMPLES_NAME

    counts = f"{outcome.reused} steps reused, {outcome.executed} run, {len(outcome.failures)} failed"
    counts += f", {outcome.skipped} skipped" if outcome.skipped else ""
    terminal.say(f"\n{counts} in {outcome.seconds:.0f} s")
    for line in outcome.left_out:
        terminal.say_wrapped(f"not used  {line}", indent=10)
    for name, decision in outcome.decisions.items():
        terminal.say("")
        terminal.say_wrapped(f"{name} version {decision.version}  {decision}", "bold")
        _show_metrics(*outcome.metrics[name], terminal)
        if trainings := outcome.trainings.get(name):
            terminal.say(f"  over {seeds_text(trainings)}:")
            for metric, text in spread_text(trainings).items():
                terminal.say(f"  {metric:<20} {text:>10}")
        for check in decision.comparisons:
            terminal.say_wrapped(f"  {check.name}: {check.detail}", indent=4)
        for remark in outcome.remarks.get(name, ()):
            terminal.say_wrapped(f"  {remark.text}", "yellow" if remark.doubt else "", indent=4)
    for report in outcome.reports.values():
        terminal.say(f"\nsamples   {report.path(SAMPLES_NAME)}")
        terminal.say(f"report    {report.path(REPORT_NAME)}")
    show_end(outcome, terminal)


def show_end(outcome: "Outcome", terminal: "Terminal") -> None:
    """Print where a run is recorded, what failed, and how to resume it if it was stopped."""
    terminal.say(f"run       {outcome.run_id}")
    terminal.say(f"MLflow    {outcome.link}")
    for name, error in outcome.failures.items():
        show_failure(name, error, terminal)
    if outcome.stopped:
        show_stopped(terminal, outcome.stopped)


def _show_metrics(before: Mapping[str, float] | None, after: Mapping[str, float], terminal: "Terminal") -> None:
    from edt_core.evaluation.metrics import in_order

    for metric in in_order(after):
        if metric.endswith("_std") and metric.removesuffix("_std") in after:
            continue
        spread = f" ± {after[f'{metric}_std']:.2g}" if f"{metric}_std" in after else ""
        untrained = "" if before is None else f"   untrained {before[metric]:.4g}"
        terminal.say(f"  {metric:<20} {after[metric]:>10.4g}{spread}{untrained}")


def show_failure(step: str, error: BaseException, terminal: "Terminal") -> None:
    """Print the cause of a step's failure, the remedy, and the log."""
    from jobs.runtime.failure import explained

    failure = explained(error)
    terminal.say("")
    terminal.say_wrapped(f"error: {step}: {failure.cause}", "red", indent=7)
    if failure.remedy:
        terminal.say_wrapped(f"       {failure.remedy}", indent=7)
    if terminal.log is not None:
        terminal.say(f"       log: {terminal.log.path}")


def show_stopped(terminal: "Terminal", how: str) -> None:
    """Print that a run was stopped, and the command that resumes it. A submitted job shows its submitter's command."""
    from pipelines.cluster.submission import RESUME_VARIABLE

    terminal.freeze()
    command = os.environ.get(RESUME_VARIABLE) or shlex.join(["edt", *sys.argv[1:]])
    terminal.say(f"\n{how}; finished work is kept. To resume:\n  {command}", "yellow")


def exit_code(outcome: "Outcome") -> int:
    """130 if the run was stopped, 2 for user errors alone and no registered model, 1 if a step failed, or 0."""
    if outcome.stopped:
        return 130
    wrong = all(isinstance(error, UserError) for error in outcome.failures.values())
    return 0 if not outcome.failures else 2 if wrong and not outcome.decisions else 1


def plan(
    config: Config = "quickstart",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    digest_again: DigestAgain = False,
    as_json: AsJson = False,
) -> None:
    """Show which steps a run would reuse, resume or run, and why; start nothing.

    \b
    Examples:
      edt plan quickstart --set train.lr=0.001
      edt plan edt.yaml --json
    """
    from pipelines.config.schema import load_config
    from pipelines.plan import plan as planned

    loaded = load_config(config, assignments, store)
    if not as_json:
        show_cost(loaded)
    rows = [step.as_row() for step in planned(loaded, catalog_if_any(loaded.store), digest_again)]
    if as_json:
        print_json(rows)
    else:
        print_plan(rows)


def print_plan(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of planned steps as a table."""
    from pipelines.setup.duration import about

    open_rows = [row for row in rows if row["action"] != "reuse"]
    known = [row["seconds"] for row in open_rows if row["seconds"] is not None]
    time = {row["step"]: about(row["seconds"]) for row in open_rows if row["seconds"] is not None}
    table = [{**row, "run": row["run_id"], "time": time.get(row["step"], "")} for row in rows]
    columns = ("action", "step", "fingerprint", "run", *(("time",) if known else ()), "why")
    print_rows(table, columns, False, extra=("run", "fingerprint"))
    if known:
        unknown = len(open_rows) - len(known)
        rest = f"; not known for the other {unknown}" if unknown else ""
        text = f"about {about(sum(known))} for {len(known)} of the {len(open_rows)} steps to run, one after another, "
        say(fitted(f"{text}at the pace of earlier artifacts in this store{rest}", screen_width(), 2))


def runs(
    pipeline: Annotated[
        str | None,
        typer.Argument(
            help="list only this pipeline, by the name in its configuration, or the run with this id, also of a step"
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    limit: Annotated[int, typer.Option(min=1, help="number of newest runs to list")] = 20,
    as_json: AsJson = False,
) -> None:
    """List pipeline runs: steps reused, steps executed, and failures.

    \b
    Examples:
      edt runs
      edt runs quickstart --limit 5 --json
      edt runs 3f2a9c41
    """
    from pipelines.tracking.runs import run_rows

    rows = run_rows(open_catalog(store, tracking_uri), pipeline, limit)
    columns = ("run", "pipeline", "status", "started", "seconds", "reused", "executed", "failed")
    table = [{**row, "failed": row["failed"].splitlines()[0][:80] if row["failed"] else ""} for row in rows]
    none = f"no runs of {pipeline}" if pipeline else "no runs"
    print_rows(rows if as_json else table, columns, as_json, none, extra=("seconds",))


def reproduce(
    run_id: Annotated[str, typer.Argument(help="MLflow id of a pipeline run, or its start as listed by `edt runs`")],
    into: Annotated[
        str | None, typer.Option(help="empty folder for the new store  \\[default: ./edt-reproduced-<run>]")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    other_code: Annotated[bool, typer.Option("--other-code", help="continue even if the code version differs")] = False,
    as_json: AsJson = False,
) -> None:
    """Repeat a run from its MLflow record alone, and compare every artifact.

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
    with logged(store, "reproduce", to_stderr=True) as terminal:
        outcome, comparisons = reproduced(run_id, catalog, folder, terminal, address, other_code)
        if outcome.stopped:
            show_stopped(terminal, outcome.stopped)
            raise typer.Exit(130)
        for name, error in outcome.failures.items():
            show_failure(name, error, terminal)
    rows = [comparison.as_row() for comparison in comparisons]
    table = [{**row, "equal": "yes" if row["equal"] else "NO"} for row in rows]
    print_rows(rows if as_json else table, ("step", "recorded", "now", "equal", "how"), as_json)
    if not as_json:
        say(f"{sum(row['equal'] for row in rows)} of {len(rows)} artifacts have the recorded content")
    if outcome.failures or not all(row["equal"] for row in rows):
        raise typer.Exit(1)
