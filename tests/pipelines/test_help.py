"""What `edt` says of itself: one line a command, examples that the parsers take, completion, exit codes."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from pipelines.cli import app
from pipelines.commands import verbs
from tests.support.small import edt, environment

ROOT: Any = typer.main.get_command(app)


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(its name, as `models show`, the command) of all commands."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())


def examples(name: str) -> list[str]:
    if name in verbs._VERBS:
        text = verbs.make_parser(name).epilog or ""
    else:
        text = (COMMANDS[name].help or "").partition("Examples:")[2]
    return [line.strip() for line in text.splitlines() if line.strip().startswith("edt ")]


def read_by_parsers(words: list[str]) -> None:
    """Have the command's own parser read the words that come after `edt`; raises what it does not like."""
    context, command, rest = None, ROOT, words
    name = "edt"
    while True:
        context = command.make_context(name, list(rest), parent=context)
        if not hasattr(command, "commands"):
            break
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    if name in verbs._VERBS:
        verbs.make_parser(name).parse_args(context.args)


def test_commands_have_the_heading_where_people_look_for_them() -> None:
    panels = {name: command.rich_help_panel for name, command in ROOT.commands.items()}
    assert {panels[name] for name in ("sample", "evaluate", "export", "models", "lineage", "compare")} == {"Models"}
    assert {panels[name] for name in ("init", "doctor", "config")} == {"Get started"}
    assert {panels[name] for name in ("preprocess", "encode", "train")} == {"Single steps"}


def test_a_switch_has_one_form() -> None:
    """`--deep`, and no `--no-deep`, which would do nothing."""
    options = [(name, option) for name, command in COMMANDS.items() for option in command.params]
    assert len(options) > 50
    assert not [(name, option.name) for name, option in options if option.secondary_opts]


def test_there_are_the_commands_that_there_should_be() -> None:
    assert {"run", "plan", "reproduce", "train", "models show", "schedule list"} < set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_line_of_help_and_examples_that_its_parser_takes(name: str) -> None:
    line = (COMMANDS[name].help or "").splitlines()[0]
    assert 10 < len(line) <= 80
    assert line.endswith(".")
    assert examples(name)
    for example in examples(name):
        words = shlex.split(example)[1:]
        assert " ".join(words).startswith(name) or name == "schedule add"
        read_by_parsers(words)


def test_a_wrong_example_would_be_found() -> None:
    for words in (["run", "--nonsense"], ["train", "a", "b", "--nonsense"], ["models", "nonsense"]):
        with pytest.raises((Exception, SystemExit)):
            read_by_parsers(words)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("edt mod", "models"),
        ("edt run quick", "quickstart"),
        ("edt run --sto", "--store"),
        ("edt train ./latents ./out --micro", "--micro-batch-size"),
    ],
)
def test_the_shell_completes(typed: str, offered: str) -> None:
    words = typed.split()
    asked = {"_EDT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    assert offered in edt(env=environment(**asked)).stdout.split()


def test_version() -> None:
    assert edt("--version").stdout.split()[0] == "edt"


def run_command(body: str) -> "subprocess.CompletedProcess[str]":
    """`edt` with one more command, of that body."""
    code = f"""
import os, signal, sys, time
from pipelines import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it is ignored
cli.app.command("added")({body})
sys.argv = ["edt", "added"]
cli.main()
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.extern
def test_a_fault_of_the_program_is_one_message_and_exit_code_1() -> None:
    done = run_command("lambda: {}['nothing']")
    assert done.returncode == 1
    assert done.stderr.startswith("error: KeyError: 'nothing'")
    assert "Traceback" not in done.stderr


@pytest.mark.extern
def test_ctrl_c_leaves_with_130() -> None:
    done = run_command("lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(600)) and None")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
