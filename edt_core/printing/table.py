"""Tables for people: short digests, and lines that fit the screen without a break in a word.

Programs read `--json`, which has every field whole.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from edt_core.printing.console import on_one_line

SHORT = 12  # digits of a digest, a run or a commit that are shown
_DIGEST = re.compile(r"(?<![0-9a-zA-Z/._-])([0-9a-f]{12})(?:[0-9a-f]{52}|[0-9a-f]{28}|[0-9a-f]{20})(?![0-9a-zA-Z/._-])")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\dZ")
_SHORT_TIME = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\dZ)")
_UNIT = re.compile(r"(\d) (?=(?:s|min|h|B|kB|MB|GB|TB)\b)")
_GAP = 2  # columns between two columns of a table
_TEXT = 24  # least columns for a text before other columns are left out
_HELD = "\u00a0"  # a space at which no line may break


def screen_width() -> int | None:
    """The columns of the terminal that standard output is; None if it is a file or a pipe."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None if sys.stdout.isatty() else None
    except (OSError, ValueError, AttributeError):
        return None


def short(text: str) -> str:
    """A text with 12 digits of each sha256, run and commit in it, and times to the minute. Paths are not changed."""
    return _TIME.sub(r"\1 \2Z", _DIGEST.sub(r"\1", text))


def table_lines(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], width: int | None, extra: Sequence[str] = ()
) -> Iterator[str]:
    """A table of these columns. On a screen of `width` columns, long cells continue in the next line.

    Without room for that, the columns in `extra` are left out in their order, and a last line names them. If that is
    not enough, each row is shown as a list of its cells.
    """
    cells = {name: [name, *(_cell(row.get(name)) for row in rows)] for name in columns}
    optional = [name for name in extra if name in columns]
    left_out: list[str] = []
    while (widths := _widths(list(cells.values()), width, bool(optional))) is None:
        if not optional:
            yield from _records(list(cells.values()), width)
            break
        left_out.append(optional.pop(0))
        del cells[left_out[-1]]
    else:
        for number in range(len(rows) + 1):
            yield from _row([column[number] for column in cells.values()], widths)
    if left_out:
        yield f"(no room for {', '.join(left_out)}; --json lists everything)"


def fitted(line: str, width: int | None, indent: int) -> str:
    """A line, broken at spaces so that it fits the screen. What continues is indented by `indent` columns."""
    if width is None or len(line) <= width:
        return line
    start = line[: len(line) - len(line.lstrip())]
    broken = wrap(
        line.lstrip(),
        max(width, len(start) + 1),
        initial_indent=start,
        subsequent_indent=" " * min(indent, width // 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(broken)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else short(on_one_line(str(value)))
    return _UNIT.sub(rf"\1{_HELD}", _SHORT_TIME.sub(rf"\1{_HELD}\2", text))


def _widths(columns: Sequence[Sequence[str]], width: int | None, roomy: bool) -> list[int] | None:
    """The width of each column so that the table fits; None if it cannot.

    The widest column becomes narrower, but no column narrower than its longest word. With `roomy`, only one column
    becomes narrower, and to 24 columns at most.
    """
    widths = [max(map(len, cells)) for cells in columns]
    if width is None:
        return widths
    least = [max(len(word) for cell in cells for word in cell.split(" ")) for cells in columns]
    room = width - _GAP * (len(columns) - 1)
    if roomy and sum(widths) > room:
        widest = widths.index(max(widths))
        least = [max(least[at], min(_TEXT, most)) if at == widest else most for at, most in enumerate(widths)]
    while sum(widths) > room:
        spare = [at for at in range(len(widths)) if widths[at] > least[at]]
        if not spare:
            return None
        widths[max(spare, key=lambda at: (widths[at], at))] -= 1
    return widths


def _row(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """The lines of one row."""
    broken = [
        wrap(cell, width, break_long_words=False, break_on_hyphens=False) if len(cell) > width else [cell]
        for cell, width in zip(cells, widths, strict=True)
    ]
    for number in range(max(map(len, broken))):
        parts = [part[number] if number < len(part) else "" for part in broken]
        line = (" " * _GAP).join(part.ljust(width) for part, width in zip(parts, widths, strict=True))
        yield line.rstrip().replace(_HELD, " ")


def _records(columns: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """Each row as lines of a column's name and its cell, with an empty line between two rows."""
    widest = max(len(column[0]) for column in columns) + _GAP
    for number in range(1, len(columns[0])):
        for column in columns:
            yield fitted(f"{column[0]:<{widest}}{column[number]}", width, widest).replace(_HELD, " ")
        if number + 1 < len(columns[0]):
            yield ""
