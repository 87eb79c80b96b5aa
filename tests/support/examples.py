"""The examples: their folders, and the commands that each README has a person type, in order."""

import hashlib
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


def inputs_digest(name: str) -> str:
    """What an example's output was made of: the commands of its README, and the files beside it, as 12 hex digits."""
    total = hashlib.sha256("\n".join(command.text for command in typed(name)).encode())
    for path in sorted(EXAMPLES.joinpath(name).glob("*.*")):
        if path.suffix in (".py", ".yaml"):
            total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]
