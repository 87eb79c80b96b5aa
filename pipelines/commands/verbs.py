"""The verbs of `jobs/` as commands. Each has its own parser, with one option for each field of its configuration."""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

# The module of a command, and its line in `edt --help`.
_VERBS = {
    "preprocess": ("jobs.stages.preprocess", "Turn labelled images into image shards: SOURCE OUT."),
    "encode": ("jobs.stages.encode", "Turn image shards into latent shards: IMAGES OUT --autoencoder PATH_OR_ID."),
    "train": ("jobs.stages.train", "Train a model on latent shards: LATENTS OUT --model EDT-S/2."),
    "evaluate": ("jobs.commands.evaluate_model", "Sample from any model and measure it: MODEL OUT --images IMAGES."),
    "amm-search": (
        "jobs.commands.amm_search",
        "Find the blocks in which attention modulation helps: MODEL OUT --images IMAGES.",
    ),
    "pareto": ("jobs.commands.pareto", "Find the fastest sampling settings for a quality: MODEL OUT."),
    "sample": ("jobs.commands.draw", "Generate images of chosen classes in one picture: MODEL --classes otter,207."),
    "export": ("jobs.commands.export", "Write samples or a model for other tools: WHAT TARGET --format FORMAT."),
    "bench": ("jobs.benchmark.command", "Measure this machine: data, encode, model, train, eval or gpu."),
}
# The heading of a command in `edt --help`, unless it is that of single steps.
_PANELS = {**dict.fromkeys(("evaluate", "amm-search", "pareto", "sample", "export"), "Models"), "bench": "Get started"}


class VerbCommand(TyperCommand):
    """A command with a job's own parser, whose options the shell can complete."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        # Newer versions of Typer vendor click, so the class comes from the click that Typer uses.
        package = TyperCommand.__mro__[1].__module__.rpartition(".")[0]
        item = import_module(f"{package}.shell_completion").CompletionItem
        items = super().shell_complete(ctx, incomplete)
        for action in make_parser(self.name or "")._actions:
            items += [item(name, help=action.help) for name in action.option_strings if name.startswith(incomplete)]
        return items


def add_verbs(app: typer.Typer, panel: str) -> None:
    """Add the verbs to the command line, under the heading `panel` unless they have another one.

    A verb reads its own arguments and prints its own help.
    """
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    for verb, (_, line) in _VERBS.items():
        add = app.command(
            verb,
            cls=VerbCommand,
            help=line,
            rich_help_panel=_PANELS.get(verb, panel),
            context_settings=settings,
            add_help_option=False,
        )
        add(_run)


def make_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, given the name of its command."""
    parser: argparse.ArgumentParser = _function(verb, "make_parser")(f"edt {verb}")
    return parser


def _run(context: typer.Context) -> None:
    verb = context.command.name or ""
    _function(verb, "main")(context.args, f"edt {verb}")


def _function(verb: str, name: str) -> Callable[..., Any]:
    """A function of a verb's module. All stages share the functions of `jobs.commands.stage`."""
    module = import_module(_VERBS[verb][0])
    if not hasattr(module, "STAGE"):
        return getattr(module, name)
    from jobs.commands import stage

    return partial(getattr(stage, name), module.STAGE)
