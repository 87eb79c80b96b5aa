"""What the pages say that a person could type: commands in blocks of code, and commands named in the text."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
DECISIONS = ROOT / "docs" / "decisions"
HISTORY = (  # mention commands of earlier versions
    "CHANGELOG.md",
    "docs/decisions.md",
    *sorted(str(path.relative_to(ROOT)) for path in DECISIONS.glob("*.md")),
)
TOOLS = (
    "edt",
    "make",
    "python",
    "pytest",
    "pip",
    "pre-commit",
    "kubectl",
    "docker",
    "ray",
    "mlflow",
    "git",
    "cd",
    "cp",
    "export",
)
_TOOL = re.compile(rf"(?:\w+=\S+ )*(?:\.venv/bin/)?({'|'.join(TOOLS)})(?: |$)")
_ASSIGNED = re.compile(r"\w+=\$\(")  # name=$(kubectl ...)
_FENCE = re.compile(r"```(\w*)")
_SHELLS = ("", "bash", "console", "sh", "shell")
Case = TypeVar("Case")


@dataclass(frozen=True)
class Command:
    """One command of a page, its continued lines joined and its comment gone."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


@dataclass(frozen=True)
class Block:
    """A block of code: its language ("" where none is stated), its first line's number, and its lines."""

    page: str
    language: str
    line: int
    lines: tuple[str, ...]

    @property
    def is_of_commands(self) -> bool:
        """Whether somebody is to type it: what begins with a command does, in every line."""
        return self.language in _SHELLS and bool(self.lines) and is_command(self.lines[0])


def failures(cases: Iterable[Case], check: Callable[[Case], object]) -> str:
    """What `check` raises of each case, a paragraph a case; nothing where it raises nothing."""
    found = []
    for case in cases:
        try:
            check(case)
        except Exception as error:  # of options the parsers raise what they like
            found.append(f"{case}\n  {type(error).__name__}: {error}")
    return "\n\n".join(found)


def is_command(text: str) -> bool:
    return bool(_TOOL.match(text) or _ASSIGNED.match(text))


def pages() -> list[Path]:
    """Every page that a person reads, in the order of their names."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    found += sorted([ROOT / "examples" / "README.md", *(ROOT / "examples").glob("*/README.md")])
    return [path for path in found if str(path.relative_to(ROOT)) not in HISTORY]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def blocks(path: Path) -> Iterator[Block]:
    """The blocks of code of a page, fenced or indented by four spaces, without their indentation."""
    page, lines = name_of(path), path.read_text().splitlines()
    at = 0
    while at < len(lines):
        start = at
        if fence := _FENCE.fullmatch(lines[at].strip()):
            at = lines.index("```", at + 1)
            yield Block(page, fence[1], start + 2, tuple(lines[start + 1 : at]))
        elif lines[at].startswith("    "):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at]):
                at += 1
            indented = [line.removeprefix("    ") for line in lines[start:at]]
            yield Block(page, "", start + 1, tuple(line.rstrip() for line in indented))
        at += 1


def commands(path: Path) -> Iterator[Command]:
    """The commands of a page's blocks. Raises ValueError for a line among them that is none."""
    for block in blocks(path):
        if not block.is_of_commands:
            continue
        waiting = ""
        for number, line in enumerate(block.lines, block.line):
            text = _without_comment(line).strip()
            whole = f"{waiting} {text}".strip()
            waiting = whole.removesuffix("\\").strip() if whole.endswith("\\") else ""
            if whole and not waiting:
                for part in whole.split(" && "):
                    if not is_command(part) and not part.startswith("cp "):
                        raise ValueError(f"{block.page}:{number} {part!r} stands among commands and is none")
                    yield Command(block.page, number, part)


def named(path: Path) -> Iterator[Command]:
    """Commands that the text of a page names in backticks, as `edt plan`; nothing that is shortened inside a word."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for text in re.findall(r"`([^`]+)`", line if not line.startswith("    ") else ""):
            if _TOOL.match(text) and text.partition(" ")[2]:
                yield Command(name_of(path), number, text)


def _without_comment(line: str) -> str:
    """A line up to a number sign that stands by itself outside quotes."""
    quoted = ""
    for at, sign in enumerate(line):
        if quoted:
            quoted = "" if sign == quoted else quoted
        elif sign in "'\"":
            quoted = sign
        elif sign == "#" and (at == 0 or line[at - 1] == " "):
            return line[:at]
    return line
