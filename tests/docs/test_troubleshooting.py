"""Headings of docs/troubleshooting.md are messages that the source really has."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
HEADINGS = re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)
GAP = "\0"  # what a message fills in


def templates() -> Iterator[str]:
    """Every text in the packages, with a gap for each value that is put into it."""
    for package in ("edt_core", "jobs", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


TEMPLATES = list(templates())


def has(message: str) -> bool:
    """Whether some text of the source has the words of a heading, gaps where the heading has dots."""
    words = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    pattern = re.compile(rf"\s*{GAP}[\s\S]*?".join(words))
    return any(pattern.search(template) for template in TEMPLATES)


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_is_a_message_of_the_source(heading: str) -> None:
    assert has(heading), f"no message of the source reads {heading!r}"


def test_a_message_that_is_none_is_found_out() -> None:
    assert len(HEADINGS) > 30
    assert not has("no images in ... at all, whatever anybody says")
    assert not has("only one class in ...")  # a gap is missing: the real one names the class
