"""`edt tune`: a search over learning rate and other fields of a recipe, at a narrow width, by Ray Tune."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from pipelines.commands.options import Assignments, Config, ConfigStore, catalog_if_any, print_rows
from pipelines.commands.studies.out_folder import check_folder
from pipelines.commands.workflow import Address, exit_code, logged, show_end, show_stopped

if TYPE_CHECKING:
    from pipelines.outcome import Outcome
    from pipelines.studies.tune.result import Results
    from pipelines.studies.tune.search import Search
    from pipelines.terminal.terminal import Terminal

RESULTS, TABLE, PICTURE, NEXT = "results.json", "results.md", "losses.png", "next.yaml"


def tune(
    config: Config,
    parameters: Annotated[
        list[str],
        typer.Option("--param", metavar="FIELD=SPACE", help="log:A..B, linear:A..B or choice:A,B,...; repeatable"),
    ],
    width: Annotated[int, typer.Option(min=1, help="width of the trials, as train.width")],
    trials: Annotated[int, typer.Option(min=1, help="number of trials")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="steps of each trial")] = None,
    budget: Annotated[float | None, typer.Option(min=1.0, help="FLOPs of each trial, instead of --steps")] = None,
    model: Annotated[str | None, typer.Option(help="registered model to search for, if there are several")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the points that are tried")] = 0,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="most trials at a time  \\[default: as many as fit, up to 8]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the results  \\[default: ./tune-NAME]")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="start, after the cost is shown")] = False,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="operations per second, in 1e12, for the time in the cost")
    ] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    address: Address = None,
) -> None:
    """Search for the learning rate, and other fields, at a narrow width.

    Trials are compared by their held-out loss at one budget. The best values go into next.yaml, where muP adapts them
    to the full width. Each trial is an ordinary training: rerun the command to resume.

    \b
    Examples:
      edt tune edt.yaml --param train.lr=log:1e-4..1e-2 --width 64 --steps 500
      edt tune edt.yaml --param train.lr=log:1e-4..1e-2 --width 64 --budget 1e15 --yes
    """
    from pipelines.config.schema import given_values
    from pipelines.studies.tune.search import search_of
    from pipelines.studies.tune.space import parse_space

    space = parse_space(parameters)
    given = given_values(config, assignments, store)
    search = search_of(given, space, model, width, trials, seed, steps, budget)
    folder = out or Path(f"tune-{given['name']}")
    check_folder(folder, (RESULTS, TABLE, PICTURE, NEXT), "the search")
    _show_cost(search, tflops, address)
    if not yes:
        raise UserError("nothing was started; add --yes to start it")
    with logged(search.config.store, "tune", to_stderr=False) as terminal:
        code = _run(search, folder, terminal, address, at_once)
    if code:
        raise typer.Exit(code)


def _show_cost(search: "Search", tflops: float | None, address: str | None) -> None:
    from jobs.runtime.cluster_address import check_named, named_address
    from pipelines.studies.tune.cost import cost_rows, cost_text
    from pipelines.studies.tune.run import plan_search
    from pipelines.terminal.terminal import Terminal

    check_named(address)
    with Terminal(to_stderr=True) as terminal:
        planned, source = plan_search(search, terminal, catalog_if_any(search.config.store))
    rows = cost_rows(search, planned)
    say(f"search for {search.model} at width {search.width} of {search.full_width}")
    print_rows(rows, list(rows[0]), False, extra=("FLOPs", "steps"))
    on_cluster = named_address(address) is not None
    say(f"{cost_text(search, planned, source.images, tflops, on_cluster)}; data steps that are missing come on top\n")


def _run(search: "Search", folder: Path, terminal: "Terminal", address: str | None, at_once: int | None) -> int:
    """Run the search and write its results. Returns the exit code."""
    from pipelines.studies.tune.run import record_results, run_search

    terminal.say(f"edt tune {search.model}", "bold")
    try:
        outcome, results = run_search(search, terminal, address, at_once)
    except KeyboardInterrupt:
        show_stopped(terminal, "stopped")
        return 130
    terminal.freeze()
    terminal.say(f"\n{outcome.reused} steps reused, {outcome.executed} run in {outcome.seconds:.0f} s")
    if results is not None:
        names = _write(results, folder)
        digest = hashlib.sha256((folder / RESULTS).read_bytes()).hexdigest()
        record_results(outcome, results, folder, names, digest)
        _show(results, folder, digest, terminal)
    return _show_end(outcome, results, terminal)


def _write(results: "Results", folder: Path) -> list[str]:
    """Write the results; the next configuration only if each trial has an outcome. Returns the names of the files."""
    from pipelines.studies.tune.render import as_markdown, draw, next_yaml

    texts = {RESULTS: results.as_json(), TABLE: as_markdown(results)}
    if results.complete and results.best is not None:
        texts[NEXT] = next_yaml(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NEXT).unlink(missing_ok=True)  # of an earlier search
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        draw(results, folder / PICTURE)
    except OSError as error:
        raise UserError(
            f"cannot write the search to {folder}: {error.strerror}; choose another folder with --out"
        ) from None
    return [*texts, PICTURE]


def _show(results: "Results", folder: Path, digest: str, terminal: "Terminal") -> None:
    from pipelines.studies.tune.render import as_markdown

    terminal.say(f"\n{as_markdown(results)}")
    terminal.say(f"results   {folder / RESULTS}  sha256 {digest}")
    terminal.say(f"table     {folder / TABLE}, picture {folder / PICTURE}")
    if (folder / NEXT).exists():
        terminal.say(f"next      edt run {folder / NEXT}")


def _show_end(outcome: "Outcome", results: "Results | None", terminal: "Terminal") -> int:
    """Show where the run is recorded, and what failed. Returns the exit code."""
    show_end(outcome, terminal)
    if outcome.stopped or results is None:
        return exit_code(outcome)
    if not results.complete:
        failed = len(results.of("failed"))
        terminal.say_wrapped(
            f"error: {failed} of {len(results.rows)} trials failed, so {NEXT} was not written; rerun the command to "
            "train them, the others are reused",
            "red",
        )
    elif results.best is None:
        terminal.say_wrapped(
            "error: all trials diverged, so there is no best one; search lower learning rates, or set "
            "train.max_grad_norm",
            "red",
        )
        return 1
    return exit_code(outcome)
