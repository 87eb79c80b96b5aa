"""What is printed: every line to standard output or standard error goes through `say`, and into logs by `printable`.

Names of files and classes come from strangers. An escape sequence in one could move the cursor, set the window's title
or hide text; a carriage return could write over the line; marks of direction could turn it round. They are shown as
`\\x1b`, `\\r`, `\\u202e`. A line break in a name is shown as `\\n` where names are listed (`on_one_line`).
"""

import re
import sys

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # Unicode's control characters, but for tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of direction
    "\u2028\u2029\ufeff\ufff9-\ufffb\U000e0000-\U000e001f"  # separators of lines and marks that have no glyph
    "\ud800-\udfff"  # bytes of a file name that are not UTF-8
)
_ESCAPED = re.compile(f"[{_UNSEEN}]")
_ESCAPED_OR_BREAK = re.compile(f"[\t\n{_UNSEEN}]")


def printable(text: str) -> str:
    """A text whose control characters and marks of direction are escaped; tabs and line feeds stay."""
    return _ESCAPED.sub(_escape, text)


def on_one_line(text: str) -> str:
    """A name as part of a line: `printable`, and its tabs and line feeds are escaped as well."""
    return _ESCAPED_OR_BREAK.sub(_escape, text)


def without_colours(text: str) -> str:
    """The output of another program without its colours, and with line feeds alone between its lines."""
    return _COLOUR.sub("", text).replace("\r\n", "\n")


def say(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a text to standard output, or to standard error; characters that it cannot encode are escaped."""
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    stream.write(f"{line}\n" if nl else line)
    stream.flush()


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
