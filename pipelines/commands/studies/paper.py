"""`edt paper`: the tables of the paper of EDT, trained, measured and shown beside the published numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from pipelines.commands.options import Assignments, ConfigStore, print_rows
from pipelines.commands.studies.out_folder import check_folder
from pipelines.commands.workflow import Address, exit_code, logged, show_outcome, show_stopped

if TYPE_CHECKING:
    from pipelines.config.schema import PipelineConfig
    from pipelines.studies.paper.table import Scale, Table
    from pipelines.terminal.terminal import Terminal


def paper(
    table: Annotated[
        str | None, typer.Argument(help="number of a table, or a figure such as figure-10; without it, list them")
    ] = None,
    scale: Annotated[
        Literal["mini", "full"], typer.Option(help="mini: tiny models on two cores; full: as the paper, on ImageNet")
    ] = "mini",
    out: Annotated[
        Path | None, typer.Option(help="folder for Markdown, CSV and picture  \\[default: ./paper-SCALE]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="with --scale full: start, after its cost is shown")] = False,
    tflops: Annotated[
        float, typer.Option(min=0.001, help="with --scale full: operations per second of a GPU, for its cost")
    ] = 100.0,
    render_only: Annotated[
        bool, typer.Option("--render", help="train nothing, and show what the store has of the table")
    ] = False,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    address: Address = None,
) -> None:
    """Train and measure a table of the paper, and show it beside its numbers.

    The paper is arXiv 2410.23788. Each row is a registered model. Existing artifacts are reused, also of other
    tables.

    \b
    Examples:
      edt paper
      edt paper 4
      edt paper 4 --set source.kind=image_folder --set source.path=./images --out ./table-4
      edt paper 1 --scale full --set source.path=/data/imagenet/train
    """
    if table is None:
        _list_tables()
        return
    from pipelines.studies.paper.pipelines import pipelines_of
    from pipelines.studies.paper.table import COUNTED, load, stem_of

    loaded = load(table)
    folder = out or Path("paper" if loaded.kind in COUNTED else f"paper-{scale}")
    if loaded.kind in COUNTED:
        _write_counted(loaded, table, pipelines_of(loaded, table, "full", assignments, store), folder, tflops)
        return
    configs = pipelines_of(loaded, table, scale, assignments, store)
    check_folder(folder, (f"{stem_of(table)}{ending}" for ending in (".md", ".csv", ".png")), "the table")
    if scale == "full" and not render_only:
        _show_price(configs, tflops)
        if not yes:
            raise UserError("nothing was started; add --yes to start it")
    with logged(configs[0].store, f"paper-{table}", to_stderr=False) as terminal:
        codes = [] if render_only else [_run(config, terminal, address) for config in configs]
        _write(loaded, table, scale, configs, folder, terminal)
    if any(codes):
        raise typer.Exit(max(codes))


def _list_tables() -> None:
    from pipelines.studies.paper.table import load, names

    rows = [
        {"table": name, "rows": len((table := load(name)).rows_at("mini")), "shows": table.title} for name in names()
    ]
    print_rows(rows, ("table", "rows", "shows"), False)


def _show_price(configs: "list[PipelineConfig]", tflops: float) -> None:
    from pipelines.studies.paper.price import IMAGES, price_of

    price = price_of(configs)
    what = "training" if price.trainings == 1 else "trainings"
    say(f"{price.trainings} {what} at full scale, on {IMAGES:,} images; GPU-days are at the rate of --tflops:")
    for line in price.lines(tflops):
        say(line)


def _run(config: "PipelineConfig", terminal: "Terminal", address: str | None) -> int:
    """Run one pipeline of a table and show its end. Returns its exit code. Exits if it was stopped."""
    from pipelines.pipeline import run as run_pipeline

    terminal.say(f"edt paper: {config.name}, models {', '.join(config.models)}", "bold")
    try:
        outcome = run_pipeline(config, terminal, address)
    except KeyboardInterrupt:
        show_stopped(terminal, "stopped")
        raise typer.Exit(130) from None
    terminal.freeze()
    show_outcome(outcome, terminal)
    if outcome.stopped:
        raise typer.Exit(130)
    return exit_code(outcome)


def _write(
    table: "Table", name: str, scale: "Scale", configs: "list[PipelineConfig]", folder: Path, terminal: "Terminal"
) -> None:
    """Write what the store has of a table: Markdown, CSV and picture."""
    from pipelines.studies.paper.picture import draw
    from pipelines.studies.paper.render import as_csv, as_markdown
    from pipelines.studies.paper.results import results_of

    results = results_of(table, name, scale, configs, terminal)
    text = as_markdown(results)
    stem = _write_texts(folder, name, text, as_csv(results))
    draw(results, Path(f"{stem}.png"))
    terminal.say(f"\n{text}")
    terminal.say(f"written to {stem}.md, .csv and .png")


def _write_counted(table: "Table", name: str, configs: "list[PipelineConfig]", folder: Path, tflops: float) -> None:
    """Write a table that needs no training."""
    from pipelines.studies.paper.counted import counted_rows
    from pipelines.studies.paper.pipelines import registered_name
    from pipelines.studies.paper.render import counted_csv, counted_markdown

    cells = counted_rows(table.kind, configs, tflops)
    rows = {row.label: cells[registered_name(row_name, "full")] for row_name, row in table.rows.items()}
    text = counted_markdown(table, name, rows)
    stem = _write_texts(folder, name, text, counted_csv(name, rows))
    say(text)
    say(f"written to {stem}.md and .csv")


def _write_texts(folder: Path, name: str, markdown: str, lines: str) -> Path:
    """Write Markdown and CSV of a table. Returns their path without the ending."""
    from pipelines.studies.paper.table import stem_of

    try:
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / stem_of(name)
        Path(f"{stem}.md").write_text(markdown, encoding="utf-8")
        Path(f"{stem}.csv").write_text(lines, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the table to {folder}: {error.strerror}; choose another folder with --out"
        ) from None
    return stem
