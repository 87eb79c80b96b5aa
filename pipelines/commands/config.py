"""Commands on configurations: edt config list, show, validate and diff."""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import typer

from edt_core.printing.console import say
from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    Assignments,
    Config,
    StoreOption,
    TrackingUri,
    open_catalog,
    print_json,
    print_rows,
)

app = typer.Typer(no_args_is_help=True, help="Inspect configurations: list, show, validate, diff.")

_STEPS_SHOWN = 4  # of the steps that a change rebuilds


@app.command("list")
def list_configs(as_json: AsJson = False) -> None:
    """List the configurations that ship with the package.

    \b
    Examples:
      edt config list
      edt config list --json
    """
    from pipelines.config.schema import config_names, load_config

    rows = []
    for name in config_names():
        config = load_config(name)
        models = ", ".join(f"{model} ({config.train_of(model).model})" for model in config.models)
        rows.append({"name": name, "image_size": config.preprocess.image_size, "models": models})
    print_rows(rows, ("name", "image_size", "models"), as_json)


@app.command()
def show(
    config: Config = "quickstart",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of YAML")] = False,
) -> None:
    """Show a configuration as a run uses it: with defaults, `base` and --set resolved.

    \b
    Examples:
      edt config show imagenet256-edt-s
      edt config show edt.yaml --set train.lr=0.002 --json
    """
    from edt_core.printing.redaction import redacted_values
    from pipelines.config.schema import as_yaml, load_config

    loaded = load_config(config, assignments)
    if as_json:
        print_json(redacted_values(loaded.model_dump(mode="json")))
    else:
        say(as_yaml(loaded), nl=False)


@app.command()
def validate(
    configs: Annotated[list[str], typer.Argument(help="names of shipped configurations, or YAML files")],
    assignments: Assignments = [],  # noqa: B006  typer copies it
    as_json: AsJson = False,
) -> None:
    """Report every problem of configurations: field, value, remedy.

    \b
    Examples:
      edt config validate edt.yaml
      edt config validate edt.yaml imagenet256-edt-s --set train.num_workers=8
    """
    from pipelines.config.check import problems

    by_config = {config: problems(config, assignments) for config in configs}
    if as_json:
        print_json([problem.as_row() for entries in by_config.values() for problem in entries])
    else:
        for config, entries in by_config.items():
            say(f"{config}: {_count_text(entries)}")
            for problem in entries:
                say(f"  {problem}".replace("\n", "\n    "))
    if any(by_config.values()):
        raise typer.Exit(2)


def _count_text(problems: Sequence[object]) -> str:
    return "ok" if not problems else f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="shipped configuration, YAML file, or MLflow id of a pipeline's run")],
    b: Annotated[
        str | None, typer.Argument(help="the second one  \\[default: A with --set]", show_default=False)
    ] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Show the fields in which two configurations differ, and the steps each rebuilds.

    \b
    Examples:
      edt config diff edt.yaml --set train.lr=0.002
      edt config diff imagenet256-edt-s edt.yaml
      edt config diff 3f2a9c41d0e84b6fa1c2d3e4f5a6b7c8 edt.yaml --store ./edt-store
    """
    from edt_core.errors import UserError
    from pipelines.diff import differences, is_run_id, made_anew, outline, read_side

    if b is None and not assignments:
        raise UserError(
            f"nothing to compare {a} with; name a second configuration, or change fields with --set KEY=VALUE"
        )
    other = a if b is None else b
    catalog = open_catalog(store, tracking_uri) if is_run_id(a) or is_run_id(other) else None
    sides = read_side(a, catalog), read_side(other, catalog, tuple(assignments))
    rows = [difference.as_row() for difference in differences(*sides)]
    models = {model for side in sides for model in side.config.models}
    table = rows if as_json else [_shown(row, models) for row in rows]
    print_rows(table, ("field", "a", "b", "rebuilt"), as_json, none="no differences")
    if not as_json and rows:
        rebuilt = made_anew(*sides)
        say(f"\n{len(rebuilt)} of {len(outline(sides[1].config))} steps are rebuilt if A has been run")


def _shown(row: Mapping[str, Any], models: Collection[str]) -> dict[str, str]:
    from pipelines.diff import shown

    steps = dict.fromkeys(_role(step, models) for step in row["steps"])
    more = f" and {len(steps) - _STEPS_SHOWN} more" if len(steps) > _STEPS_SHOWN else ""
    rebuilt = ", ".join([*steps][:_STEPS_SHOWN]) + more if steps else "nothing"
    return {"field": row["field"], "a": shown(row["a"]), "b": shown(row["b"]), "rebuilt": rebuilt}


def _role(step: str, models: Collection[str]) -> str:
    """A step's name without that of its model."""
    role, _, model = step.rpartition(" ")
    return role if model in models else step
