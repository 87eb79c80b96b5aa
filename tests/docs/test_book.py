"""The book of `make docs` without its generator: navigation, API reference, pins, and Markdown of the two dialects."""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.book.forge import title_of, with_focus, with_links, with_lists
from infra.book.notebook import as_markdown
from tests.support.pages import ROOT, blocks, pages

BOOK = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
API: dict[str, Any] = BOOK["extra"]["api"]
NAMES = [name for entry in API.values() for name in entry["names"]]


def leaves(entry: Any) -> Iterator[str]:
    """The pages and folders of the navigation, in order."""
    if isinstance(entry, str):
        yield entry
    else:
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from leaves(below)


def test_the_navigation_has_every_page_once() -> None:
    entries = [*leaves(BOOK["nav"])]
    docs = ROOT / "docs"
    folders = [entry for entry in entries if entry.endswith("/")]
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    listed = {page for page in there if not page.startswith(tuple(folders))}
    outside = [place for place in BOOK["extra"]["pages"].values() if place.endswith(".md")]
    assert sorted(entry for entry in entries if entry not in folders) == sorted([*listed, *outside])
    assert "api/" in folders
    assert BOOK["strict"] is True


def test_pages_from_outside_docs_are_there() -> None:
    assert all((ROOT / path).is_file() for path in BOOK["extra"]["pages"])


def test_the_book_has_everything_of_the_examples() -> None:
    files = [*(ROOT / "examples").rglob("README.md"), *(ROOT / "examples").glob("*/output/*")]
    assert len(files) >= 10
    assert {str(path.relative_to(ROOT)) for path in files} <= set(BOOK["extra"]["pages"])


def test_a_notebook_becomes_a_page_with_its_outputs() -> None:
    cells = [
        {"cell_type": "markdown", "id": "t", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "id": "c",
            "source": ["a = 1\n", "a"],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]},
                {
                    "data": {
                        "text/html": ["<style scoped>\n td {}\n</style>\n", '<table border="1"></table>'],
                        "text/plain": "t",
                    }
                },
                {"data": {"image/png": "aGVsbG8=\n", "text/plain": "<Figure>"}},
                {"data": {"text/plain": "1"}},
            ],
        },
    ]
    page, pictures = as_markdown(json.dumps({"cells": cells}), "book")
    assert page == (
        "# Title\ntext\n\n```python\na = 1\na\n```\n\n```text\none\ntwo\n```\n\n<table></table>\n\n"
        "![Output of the cell c](book-c-2.png)\n\n```text\n1\n```\n"
    )
    assert pictures == {"book-c-2.png": b"hello"}


def is_name(name: str) -> bool:
    """Whether a dotted name is a module of the packages or a name at the top of one."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module, _, last = name.rpartition(".")
    file = ROOT / module.replace(".", "/")
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return file.is_file() and last in top_names(file)


def top_names(file: Path) -> set[str]:
    """What a module defines at its top."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_api_reference_is_in_the_source(name: str) -> None:
    assert is_name(name)
    assert not is_name(f"{name}_gone")


def imports() -> Iterator[tuple[str, str]]:
    """(module, name) of what README, docs and the notebook import from our packages."""
    code = ["\n".join(block.lines) for page in pages() for block in blocks(page) if "import " in "\n".join(block.lines)]
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        code += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for text in code:
        for module, names in re.findall(r"^from ((?:edt_core|jobs|pipelines)[\w.]*) import (.+)$", text, re.MULTILINE):
            yield from ((module, name.strip()) for name in names.split(","))


def test_what_pages_and_the_notebook_import_is_in_the_api_reference() -> None:
    imported = {*imports()}
    assert len(imported) > 10
    missing = {
        (module, name)
        for module, name in imported
        if module not in NAMES and f"{module}.{name}" not in NAMES and (module, name) != ("edt_core", "EDTPipeline")
    }
    assert not missing, f"add them to extra.api of mkdocs.yml: {missing}"
    assert "edt_core.sampling.diffusers_pipeline.EDTPipeline" in NAMES


def test_the_pins_meet_the_requirements_of_the_extra() -> None:
    lines = (ROOT / "requirements-docs.lock").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["optional-dependencies"]["docs"]):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, but {version} is locked"


FORGE = """\
Text:
- a
  continued

      code
- b
  1. one
     more
     - deep
  2. two

After
lazily 1. none
- c
```
- code
  - as it is
```
    - indented code
"""
GENERATOR = """\
Text:

- a
    continued

        code
- b
    1. one
        more
        - deep
    2. two

After
lazily 1. none

- c
```
- code
  - as it is
```
    - indented code
"""


def test_lists_of_the_forge_get_the_generators_indentation() -> None:
    assert with_lists(FORGE) == GENERATOR


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[data.md](data.md#a)", "[Data](data.md#a)"),
        ("[the log](../CHANGELOG.md)", "[the log](changelog.md)"),
        ("[code](../edt_core/config.py)", "[code](https://forge/tree/edt_core/config.py)"),
        ("![plot](ablation.png)", "![plot](ablation.png)"),
        ("[gone](../gone.md)", "[gone](../gone.md)"),
        ("[web](https://x.org/a)", "[web](https://x.org/a)"),
        ("[here](#a)", "[here](#a)"),
        ("```\n[data.md](data.md)\n```\n", "```\n[data.md](data.md)\n```\n"),
    ],
)
def test_links_lead_within_the_book_or_to_the_repository(link: str, expected: str) -> None:
    book = {"docs/a.md": "a.md", "docs/data.md": "data.md", "docs/ablation.png": "ablation.png"}
    book |= {"CHANGELOG.md": "changelog.md", "docs/decisions/b.md": "decisions/b.md"}
    titles = {"docs/data.md": title_of("# Data: shards, readers\n")}
    assert with_links(link, "docs/a.md", book, titles, ROOT, "https://forge/tree/") == expected
    plain = with_links(link, "docs/a.md", book, titles, ROOT, None)
    assert plain == ("code" if "edt_core" in link else expected)


def test_links_of_a_page_in_a_folder_and_of_one_from_outside() -> None:
    book = {"docs/decisions/b.md": "decisions/b.md", "docs/data.md": "data.md", "README.md": "overview.md"}
    assert with_links("[x](../data.md)", "docs/decisions/b.md", book, {}, ROOT, None) == "[x](../data.md)"
    assert with_links("[x](docs/data.md)", "README.md", book, {}, ROOT, None) == "[x](data.md)"
    assert with_links("[x](../../README.md)", "docs/decisions/b.md", book, {}, ROOT, None) == "[x](../overview.md)"


def test_the_keyboard_reaches_wide_blocks_of_code() -> None:
    """They scroll sideways. The markup is that of the generator's highlighter."""
    page = "<p><code>edt</code></p><div class=highlight><pre><span></span><code>edt run"
    assert with_focus(page) == page.replace("</span><code>", '</span><code tabindex="0">')
