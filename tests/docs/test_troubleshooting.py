"""Headings of docs/troubleshooting.md are messages that the source really has."""

import ast
import re
from collections.abc import Iterator
from functools import cache

from tests.support.pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
HEADINGS = re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)
GAP = "\0"  # what a message fills in


@cache
def templates() -> tuple[str, ...]:
    """Every text in the packages, with a gap for each value that is put into it."""
    return tuple(_templates())


def _templates() -> Iterator[str]:
    for package in ("edt_core", "jobs", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def has(message: str) -> bool:
    """Whether some text of the source has the words of a heading, gaps where the heading has dots."""
    words = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    pattern = re.compile(rf"\s*{GAP}[\s\S]*?".join(words))
    return any(pattern.search(template) for template in templates())


def test_every_heading_is_a_message_of_the_source() -> None:
    missing = [heading for heading in HEADINGS if not has(heading)]
    assert not missing, f"no message of the source reads {missing}"


def test_a_message_that_is_none_is_found_out() -> None:
    assert len(HEADINGS) > 30
    assert not has("no images in ... at all, whatever anybody says")
    assert not has("only one class in ...")  # a gap is missing: the real one names the class
