"""The command line: `edt`. The commands are in `pipelines.commands`; here is what it is made of, and how it ends."""

import sys
from collections.abc import Callable

import typer

from edt_core.errors import UserError
from edt_core.redaction import redacted
from pipelines.commands import config, cost, doctor, init, models, schedule, store, submit, ui, verbs, workflow

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Labelled images to a registered, evaluated Efficient Diffusion Transformer.",
)

COMMANDS: tuple[Callable[..., None], ...] = (
    workflow.run,
    workflow.plan,
    workflow.runs,
    workflow.reproduce,
    store.artifacts,
    store.gc,
    store.verify,
    models.lineage,
    cost.cost,
    cost.compare,
    submit.submit,
)

for command in COMMANDS:
    app.command()(command)
for verb in (
    verbs.preprocess,
    verbs.encode,
    verbs.train,
    verbs.evaluate,
    verbs.amm_search,
    verbs.sample,
    verbs.export,
    verbs.bench,
):
    app.command(**verbs.SETTINGS)(verb)  # type: ignore[arg-type]
app.command(epilog=init.EXAMPLES)(init.init)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
app.command(epilog=ui.EXAMPLES)(ui.ui)
app.command("import")(models.import_model)
app.add_typer(models.app, name="models")
app.add_typer(schedule.app, name="schedule")
app.add_typer(config.app, name="config")


def main() -> None:
    """Entry point: user errors, and an MLflow that does not answer, are one message and exit code 2."""
    try:
        app()
    except Exception as error:
        if not isinstance(error, UserError) and not type(error).__module__.startswith("mlflow."):
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(2)


def _message(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    first = str(error).splitlines()[0]
    return redacted(f"MLflow does not answer, or refuses: {first[:500]}; see to MLFLOW_TRACKING_URI and the server")


if __name__ == "__main__":
    main()
