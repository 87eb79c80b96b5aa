"""The command line: `edt`. The commands are in `pipelines.commands`; here is what it is made of, and how it ends."""

import sys

import typer

from edt_core.errors import UserError
from pipelines.commands import schedule, store, submit, verbs, workflow

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Labelled images to a registered, evaluated Efficient Diffusion Transformer.",
)

app.command()(workflow.run)
for verb in (verbs.preprocess, verbs.encode, verbs.train, verbs.evaluate, verbs.export, verbs.bench):
    app.command(**verbs.SETTINGS)(verb)  # type: ignore[arg-type]
app.command()(workflow.configs)
app.command()(store.verify)
app.add_typer(schedule.app, name="schedule")
app.command()(submit.submit)


def main() -> None:
    """Entry point: user errors are one message and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
