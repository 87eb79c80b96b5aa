"""Text files are UTF-8 wherever they are read or written: the locale of a machine decides nothing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_FILES = [path for package in ("edt_core", "jobs", "pipelines") for path in sorted((ROOT / package).rglob("*.py"))]
_TEXT = {"read_text", "write_text"}
_OPENERS = {"open", "NamedTemporaryFile", "fdopen"}
_PROCESSES = {"run", "Popen", "check_output"}


def _without_encoding(tree: ast.Module) -> Iterator[str]:
    """The calls that would read or write text in the encoding of the locale."""
    ours = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
            and node.module == "edt_core.files.small_files" for alias in node.names}  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in given or (isinstance(node.func, ast.Name) and name in ours):
            continue
        if name in _TEXT or (name in _PROCESSES and "text" in given) or (name in _OPENERS and _is_text(node, given)):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def _is_text(call: ast.Call, given: dict[str | None, ast.expr]) -> bool:
    """Whether the mode of `open(path, mode)` or `path.open(mode)` is one of text; archives have `force_zip64`."""
    if "force_zip64" in given:
        return False
    is_method = isinstance(call.func, ast.Attribute)
    place = 0 if is_method and call.func.attr == "open" else 1
    if getattr(call.func, "attr", getattr(call.func, "id", "")) == "NamedTemporaryFile":
        place = 0
    mode = given.get("mode", call.args[place] if len(call.args) > place else None)
    if mode is None:
        return not (is_method and call.args) and getattr(call.func, "attr", "") != "NamedTemporaryFile"
    known = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwaxb+t")
    return known and "b" not in str(mode.value)


def test_every_text_file_has_an_encoding() -> None:
    found = {path: list(_without_encoding(ast.parse(path.read_text(encoding="utf-8")))) for path in _FILES}
    assert len(found) > 100
    assert not [f"{path.relative_to(ROOT)}, {call}" for path, calls in found.items() for call in calls]


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("open('a')", True),
        ("open('a', 'rb')", False),
        ("path.open('w')", True),
        ("path.open('wb')", False),
        ("subprocess.run([], text=True)", True),
        ("subprocess.run([], encoding='utf-8')", False),
    ],
)
def test_the_search_sees_a_missing_encoding(line: str, is_found: bool) -> None:
    assert bool(list(_without_encoding(ast.parse(line)))) is is_found
