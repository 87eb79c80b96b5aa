"""Phrases that we do not write, in pages, sources, templates and configurations. `make prose` runs proselint too."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.support.pages import ROOT

# A pattern of words -> what to write instead.
INSTEAD = {
    r"told": "reported, shown",
    r"anew": "again, rebuilt",
    r"in silence": "silently",
    r"goes on|go on": "continues, resumes",
    r"whoever": "the person who, the process that",
    r"hangs? on": "depends on",
    r"stands? for": "means",
    r"(?:is|are) had": "is available",
    r"what becomes of": "how ... is handled, the result of",
    r"for ever": "forever, indefinitely",
    r"nothing to do but": "the command to give",
    r"by heart": "memorise",
    r"(?:is|are)(?: all)? to be": "must be, is",
    r"are all to": "all ... must",
    r"it is said": "is reported, warns",
    r"as ever": "still, as usual",
    r"hence": "so, therefore",
    r"lest": "so that ... not",
    r"wants": "needs",
    r"at hand": "available",
}
_PHRASES = re.compile(rf"\b(?:{'|'.join(INSTEAD)})\b".replace(" ", r"\s+"), re.IGNORECASE)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted([ROOT / "examples" / "README.md", *(ROOT / "examples").glob("*/README.md")])
SOURCES = [
    path
    for package in ("edt_core", "jobs", "pipelines")
    for path in sorted((ROOT / package).rglob("*"))
    if path.suffix in (".py", ".j2", ".yaml")
]


def remarks(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, phrase, what to write instead) of each phrase; what is in backticks does not count."""
    text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]+`", "``", text)
    for match in _PHRASES.finditer(text):
        words = " ".join(match[0].split())
        instead = next(good for bad, good in INSTEAD.items() if re.fullmatch(bad, words, re.IGNORECASE))
        yield text.count("\n", 0, match.start()) + 1, match[0], instead


def remarks_of(paths: Iterable[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {phrase!r}; write: {instead}"
        for path in paths
        for line, phrase, instead in sorted(remarks(path.read_text()))
    ]


def test_the_sources_have_none_of_the_phrases() -> None:
    assert len(SOURCES) > 300
    assert not (found := remarks_of(SOURCES)), "\n".join(found)


def test_the_pages_have_none_of_the_phrases() -> None:
    assert len(PAGES) > 30
    assert not (found := remarks_of(PAGES)), "\n".join(found)


def test_a_phrase_is_found_across_lines_and_not_in_code() -> None:
    assert [*remarks("The result\nhangs\non it, `told` or ``anew`` aside.")] == [(2, "hangs\non", "depends on")]
    assert not [*remarks("a unit\n```ini\nWants=network-online.target\n```\n")]
    assert not [*remarks("The host hands on what it has; the strangest ones foretold it.")]
