"""Printing: all text for standard output and standard error goes through `say`, text for logs through `printable`.

Names of files and classes are untrusted. An escape sequence in one could move the cursor, set the window's title or
hide text; a carriage return could overwrite the line; direction marks could reverse it. They are shown as `\\x1b`,
`\\r`, `\\u202e`. In lists of names, a line break in a name is shown as `\\n` (`on_one_line`).
"""

import re
import sys

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # Unicode's control characters, except tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of direction
    "\u2028\u2029\ufeff\ufff9-\ufffb\U000e0000-\U000e001f"  # separators of lines and marks that have no glyph
    "\ud800-\udfff"  # bytes of a file name that are not UTF-8
)
_ESCAPED = re.compile(f"[{_UNSEEN}]")
_ESCAPED_OR_BREAK = re.compile(f"[\t\n{_UNSEEN}]")


def printable(text: str) -> str:
    """A text with control characters and direction marks escaped, except tabs and line feeds."""
    return _ESCAPED.sub(_escape, text)


def on_one_line(text: str) -> str:
    """A name as part of a line: like `printable`, with tabs and line feeds escaped too."""
    return _ESCAPED_OR_BREAK.sub(_escape, text)


def without_colours(text: str) -> str:
    """The output of another program without colours, with plain line feeds between its lines."""
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
