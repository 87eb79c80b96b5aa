"""The verbs of `jobs/` as commands. Each has its own parser, one option a field of its configuration."""

import argparse
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

_MODULES = {
    "preprocess": "jobs.stages.preprocess",
    "encode": "jobs.stages.encode",
    "train": "jobs.stages.train",
    "evaluate": "jobs.commands.evaluate_model",
    "amm-search": "jobs.commands.amm_search",
    "sample": "jobs.commands.draw",
    "export": "jobs.commands.export",
    "bench": "jobs.benchmark.command",
}


class VerbCommand(TyperCommand):
    """A command that a job's own parser reads, of which the shell learns its options."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        # Typer brings a click of its own in newer versions: the class is that of whichever it builds on.
        package = TyperCommand.__mro__[1].__module__.rpartition(".")[0]
        item = import_module(f"{package}.shell_completion").CompletionItem
        found = super().shell_complete(ctx, incomplete)
        for action in make_parser(self.name or "")._actions:
            found += [item(name, help=action.help) for name in action.option_strings if name.startswith(incomplete)]
        return found


# A verb prints its own help.
SETTINGS: dict[str, Any] = {
    "cls": VerbCommand,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}


def make_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, by the name of its command."""
    from jobs.commands import stage

    module, prog = import_module(_MODULES[verb]), f"edt {verb}"
    parser: argparse.ArgumentParser = (
        stage.make_parser(module.VERB, prog) if hasattr(module, "VERB") else module.make_parser(prog)
    )
    return parser


def _run(verb: str, context: typer.Context) -> None:
    from jobs.commands import stage

    module, prog = import_module(_MODULES[verb]), f"edt {verb}"
    if hasattr(module, "VERB"):
        stage.main(module.VERB, context.args, prog)
    else:
        module.main(context.args, prog)


def preprocess(context: typer.Context) -> None:
    """Turn labelled images into image shards: SOURCE OUT."""
    _run("preprocess", context)


def encode(context: typer.Context) -> None:
    """Turn image shards into latent shards: IMAGES OUT --autoencoder PATH_OR_ID."""
    _run("encode", context)


def train(context: typer.Context) -> None:
    """Train a model on latent shards: LATENTS OUT --model EDT-S/2."""
    _run("train", context)


def evaluate(context: typer.Context) -> None:
    """Sample from any model and measure it: MODEL OUT --images IMAGES."""
    _run("evaluate", context)


def amm_search(context: typer.Context) -> None:
    """Find where to modulate a model's attention: MODEL OUT --images IMAGES."""
    _run("amm-search", context)


def sample(context: typer.Context) -> None:
    """Draw images of chosen classes into one picture: MODEL --classes otter,207."""
    _run("sample", context)


def export(context: typer.Context) -> None:
    """Write samples or a model for other tools: WHAT TARGET --format FORMAT."""
    _run("export", context)


def bench(context: typer.Context) -> None:
    """Measure this machine: data, encode, model, train or eval."""
    _run("bench", context)
