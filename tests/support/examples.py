"""The examples: their folders, and the commands that each README has a person type, in order."""

from collections.abc import Iterator
from pathlib import Path

from tests.support.pages import ROOT, Command, commands

EXAMPLES = ROOT / "examples"
NAMES = ("digits", "photos", "released")
OUTPUT, TERMINAL = "output", "terminal.md"  # folder of what the commands printed and drew, made by `make examples`


def readme(name: str) -> Path:
    return EXAMPLES / name / "README.md"


def typed(name: str) -> Iterator[Command]:
    """The commands of an example that are run in its folder."""
    for command in commands(readme(name)):
        if command.words[0] not in ("cd", "make", "pip"):
            yield command
