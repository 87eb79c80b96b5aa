"""From Markdown as forges read it (GitHub's dialect) to Markdown as the book's generator reads it (Python-Markdown).

The pages are written for the forge and stay where they are. Two things differ in the book: the indentation of lists,
and links to files of the repository that are not pages of the book.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

_FENCE = re.compile(r" *(`{3,}|~{3,})")
_ITEM = re.compile(r"( *)([-*+]|\d{1,9}[.)])( {1,4})(?=\S)")
_BLOCK = re.compile(r" *(#{1,6} |>|\||`{3}|~{3})")  # begins a block, so it does not continue a paragraph
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_ADDRESS = re.compile(r"[a-z][a-z+.-]*:|#|//")


def with_lists(text: str) -> str:
    """`text` with four spaces for each level of a list, and an empty line between a paragraph and a list after it."""
    return "\n".join(_with_lists(text.splitlines())) + "\n"


def _with_lists(lines: list[str]) -> Iterator[str]:
    columns: list[int] = []  # where the content of each open list item begins, outermost first
    fence, previous = "", ""
    for line in lines:
        text = line.lstrip(" ")
        column = len(line) - len(text)
        continues = previous.strip() and not _BLOCK.match(line) and not _BLOCK.match(previous)
        item = None if fence else _ITEM.match(line)
        in_list = bool(columns)
        if text and not fence and (item or not continues):
            while columns and column < columns[-1]:
                columns.pop()
        if item and column - (columns[-1] if columns else 0) < 4:
            if previous.strip() and not in_list:
                yield ""
            yield "    " * len(columns) + f"{item[2]} {line[item.end() :]}"
            columns.append(item.end())
        elif text:
            yield "    " * len(columns) + line[min(column, columns[-1] if columns else 0) :]
        else:
            yield ""
        if (mark := _FENCE.match(line)) and not (item and fence):
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        previous = line


def title_of(text: str) -> str:
    """The first heading of a page, up to a colon or comma. Empty for a page without one."""
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    return re.split(r"[:,]", heading[1])[0] if heading else ""


def with_links(
    text: str, page: str, book: Mapping[str, str], titles: Mapping[str, str], root: Path, repository: str | None
) -> str:
    """`text` of the file `page` with its links to files of the repository as links within the book.

    page: path of the file in the repository; book: path in the repository -> path in the book's folder of pages, for
    each file of the book; titles: path in the repository -> title, which replaces the name of a file as the text of a
    link. A file or folder that is not in the book becomes a link to `repository`, the address of the tree on the
    forge, or plain text without one. A link that leads nowhere stays, so that a strict build refuses it.
    """

    def link(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if _ADDRESS.match(target):
            return match[0]
        name, sign, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), name))
        if path in book:
            label = titles.get(path) or label if label.strip("`") in (name, path) else label
            return f"{mark}[{label}]({os.path.relpath(book[path], os.path.dirname(book[page]) or '.')}{sign}{anchor})"
        if path.startswith("..") or not (root / path).exists():
            return match[0]
        return f"{mark}[{label}]({repository.rstrip('/')}/{quote(path)}{sign}{anchor})" if repository else label

    return "".join(part if code else _LINK.sub(link, part) for code, part in _parts(text))


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """The text in parts: (whether it is fenced code, lines)."""
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        inside = bool(fence)
        if mark:
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        yield inside or bool(mark), line


def with_focus(html: str) -> str:
    """Blocks of code that the keyboard reaches: those that are wider than the page scroll sideways."""
    return html.replace("<pre><span></span><code>", '<pre><span></span><code tabindex="0">')
