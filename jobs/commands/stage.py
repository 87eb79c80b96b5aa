"""The command of one stage, such as `edt train`: `INPUT OUT`, and an option for each further input and field."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edt_core.config import SourceConfig, TrainConfig
from edt_core.errors import UserError
from edt_core.printing.console import say
from edt_core.progress import Progress, Silent
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from jobs.commands.inputs import add_role, open_input, role_help
from jobs.commands.options import add_fields, given_fields, parse_assignment, parser_of, read_yaml, validated
from jobs.models.initial import initial_source
from jobs.runtime.cluster_address import check_named
from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import Bar
from jobs.stages.holdout.split import settled_alone
from jobs.stages.stage import Input, Stage
from jobs.stages.training.follow import UNTIL, check_patience

_EXTRA_HELP = {
    "autoencoder": "for sample grids",
    "images": "for class names, with --init-from, and for --holdout, unless the store of the latents has it",
}
_OUT_HELP = "folder or URI for the artifact: new, empty, or of an unfinished run to resume"


def main(stage: Stage, arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run one stage: `INPUT OUT`, and an option for each further input and field. Exits with 0, 1, 2 or 130."""
    parser = make_parser(stage, prog or f"python -m jobs.{stage.name}")
    options = parser.parse_args(arguments)
    with exit_code():
        if getattr(options, "dry_run", False):
            say(_planned(stage, options))
            return
        artifact = _run_alone(stage, options)
        digest = artifact.manifest.digest[:12]
        say(f"{artifact.folder.uri}  {len(artifact.manifest.files)} files  digest {digest}")


def make_parser(stage: Stage, prog: str) -> argparse.ArgumentParser:
    """The parser for the arguments of `main`."""
    first, *others = stage.roles
    parser = parser_of(prog, (stage.run.__doc__ or "").split("\n")[0], stage.examples)
    parser.add_argument(first, help=role_help(stage, first))
    parser.add_argument("out", help=_OUT_HELP)
    for role in others:
        parser.add_argument(f"--{role}", required=True, help=role_help(stage, role))
    for role in _of_options(stage.optional):
        add_role(parser, role)
    for role in filter(_EXTRA_HELP.get, stage.extras):
        parser.add_argument(f"--{role}", help=f"{role_help(stage, role)}; {_EXTRA_HELP[role]}")
    if stage.plan is not None:
        parser.add_argument(
            "--dry-run", action="store_true", help="print what this would do and cost, without running it"
        )
    if first == "source":
        add_fields(parser.add_argument_group("source"), SourceConfig, leave_out=("path",))
    add_fields(parser.add_argument_group("fields"), stage.config)
    parser.add_argument("--config", type=Path, help=f"YAML file with fields of {stage.config.__name__}")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="set one field")
    return parser


def _config(stage: Stage, options: argparse.Namespace) -> Any:
    fields: dict[str, Any] = read_yaml(options.config) if options.config else {}
    fields |= given_fields(options, stage.config) | dict(parse_assignment(text) for text in options.set)
    if stage.config is TrainConfig:
        from edt_core.diffusion import train_defaults

        fields = {**train_defaults(fields), **fields}
    return validated(stage.config, fields)


def _of_options(roles: Sequence[str]) -> list[str]:
    """The roles that have an option: not what a field of the configuration names, or only a pipeline has."""
    return [role for role in roles if role not in ("init", UNTIL)]


def _inputs(options: argparse.Namespace, roles: Sequence[str], progress: Progress) -> dict[str, Input]:
    out = Folder.at(options.out)
    return {role: open_input(role, getattr(options, role), out, options, progress) for role in roles}


def _planned(stage: Stage, options: argparse.Namespace) -> str:
    assert stage.plan is not None
    return stage.plan(_config(stage, options), _inputs(options, stage.roles, Silent()))


def _run_alone(stage: Stage, options: argparse.Namespace) -> Artifact:
    config, folder = _config(stage, options), Folder.at(options.out)
    check_place(folder, [getattr(options, role) for role in stage.roles])
    check_named()
    others = (*_of_options(stage.optional), *filter(_EXTRA_HELP.get, stage.extras))
    roles = [*stage.roles, *(role for role in others if getattr(options, role))]
    with Bar(stage.name) as bar:
        inputs = _inputs(options, roles, bar)
        if isinstance(config, TrainConfig):
            check_patience(config, inputs)
            config = settled_alone(config, inputs, bar)
            if (initial := initial_source(config)) is not None:
                inputs["init"] = initial
        return stage.make(config, inputs, folder, bar)


def check_place(folder: Folder, inputs: Sequence[str]) -> None:
    """Raise UserError if a local output folder contains an input, or is inside an input or another artifact."""
    if (root := folder.local) is None:
        return
    out = root.resolve()
    for location in inputs:
        path = Folder.at(location).local
        if path is None or not path.exists():
            continue
        path = path.resolve()
        if out == path or out in path.parents or path in out.parents:
            raise UserError(f"the output folder {out} and the input {path} overlap; use a separate folder")
    if above := next((parent for parent in out.parents if (parent / MANIFEST_NAME).exists()), None):
        raise UserError(f"the output folder {out} is inside the artifact {above}; use a separate folder")
