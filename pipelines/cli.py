"""The command line `edt`: its commands, which are in `pipelines.commands`, and its exit codes."""

import sys
from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from edt_core.child_process import protect_children
from edt_core.printing.console import say
from jobs.runtime.termination import term_interrupts
from pipelines.commands import (
    config,
    cost,
    doctor,
    gc,
    init,
    models,
    retrain,
    schedule,
    store,
    submit,
    ui,
    verbs,
    webhook,
    workflow,
)
from pipelines.commands.derived import chain, distill, ema, prune, quantize
from pipelines.commands.serving import serve
from pipelines.commands.studies import paper, scaling, tune

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Labelled images to a registered, evaluated Efficient Diffusion Transformer.",
)

COMMANDS: Mapping[str, tuple[Callable[..., None], ...]] = {
    "Get started": (init.init, doctor.doctor),
    "Pipeline": (workflow.plan, workflow.run, retrain.retrain, distill.distill, prune.prune, submit.submit),
    "Runs and artifacts": (ui.ui, workflow.runs, workflow.reproduce, store.artifacts, store.verify, gc.gc),
    "Studies": (paper.paper, scaling.scaling, tune.tune),
    "Models": (models.lineage, serve.serve, ema.ema, quantize.quantize, cost.compare, cost.cost),
}

for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(config.app, name="config", rich_help_panel="Get started")
app.add_typer(schedule.app, name="schedule", rich_help_panel="Pipeline")
app.add_typer(models.app, name="models", rich_help_panel="Models")
app.add_typer(webhook.app, name="webhook", rich_help_panel="Models")
models.app.command("set-chain")(chain.set_chain)
app.command("import", rich_help_panel="Models")(models.import_model)
verbs.add_verbs(app, "Single steps")


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        say(f"edt {version('edt-pipeline')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Labelled images to a registered, evaluated Efficient Diffusion Transformer."""


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 a failure, 2 a user error, 130 interrupted (also by SIGTERM)."""
    protect_children()
    try:
        with term_interrupts():
            app(prog_name="edt")  # shell completion needs this name, however the program is started
    except Exception as error:
        from jobs.runtime.failure import tell_failure

        sys.exit(tell_failure(error))


if __name__ == "__main__":
    main()
