"""Removes values of secret environment variables from texts, in any encoding that libraries use."""

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|ACCESS_KEY|API_?KEY|PRIVATE_KEY|AUTH_KEY|CONNECTION_STRING"
)
_SHORTEST = 6  # characters: a shorter value may be an ordinary word
_URL_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#:\s]*:(?!\d{0,5}[/?#])(.+)@", re.IGNORECASE | re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z0-9]+")  # characters that no encoding changes
_ESCAPES = r"\\{0,4}"  # of JSON or repr in a text that is itself written as JSON or repr
_ENTITIES = {'"': "quot", "&": "amp", "<": "lt", ">": "gt", "'": "apos"}
_CONTROLS = {"\n": "n", "\r": "r", "\t": "t"}


def without_secret_values(text: str, variables: Mapping[str, str] | None = None) -> str:
    """A text with the values of secret variables replaced by their names, such as `<AWS_SECRET_ACCESS_KEY>`.

    A variable is secret if its name says so; if its value is a URL with a password, the password is secret. Values are
    found verbatim, percent-encoded (in whole or in part), as JSON, repr, HTML, YAML or a shell write them, and in
    mixtures of these. Values of fewer than 6 characters stay. `variables`: by default those of this process.
    """
    values = _secrets(os.environ if variables is None else variables)
    for value, name in sorted(values, key=lambda pair: -len(pair[0])):  # one may be a part of another
        text = text.replace(value, f"<{name}>")
        longest = max(_PLAIN.findall(value), key=len, default="")
        if longest != value and longest in text:
            text = _written(value).sub(f"<{name}>", text)
    return text


def _secrets(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(value, name of its variable) of each secret."""
    for name, value in variables.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name.upper()):
            yield value, name
        elif "://" in value and (match := _URL_PASSWORD.match(value)) and len(match[1]) >= _SHORTEST:
            yield match[1], name


@lru_cache(maxsize=256)
def _written(value: str) -> re.Pattern[str]:
    """A pattern that matches a value in each of its encodings."""
    return re.compile("".join(map(_character, value)))


def _character(char: str) -> str:
    """A pattern that matches one character in each of its encodings."""
    if _PLAIN.fullmatch(char):
        return char
    ways = [re.escape(char), _percent(char), _unicode_escape(char), rf"&#0*{ord(char)};", rf"(?i:&#x0*{ord(char):x};)"]
    if char in _ENTITIES:
        ways.append(f"&{_ENTITIES[char]};")
    if char in _CONTROLS:
        ways += [rf"\\{{1,4}}{_CONTROLS[char]}", r"\n[ \t]*\n[ \t]*"]  # YAML writes a line's end as an empty line
    if char == " ":
        ways.append(r"\+")
    if char == "'":
        quoted = rf"'{_ESCAPES}\"'{_ESCAPES}\"'"  # a shell ends its quoted string for it and starts a new one
        ways += [quoted, r"'\\{1,4}''", "''"]
    if char == "\\":
        ways[0] = r"\\{1,8}"
    ways.sort(key=len, reverse=True)  # the longest first: a part of it would leave the rest
    return f"{'' if char == chr(92) else _ESCAPES}(?:{'|'.join(ways)})"


def _percent(char: str) -> str:
    """A pattern that matches percent-encoded UTF-8, also if encoded repeatedly."""
    data = char.encode("utf-8", "surrogateescape")
    return "(?i:" + "".join(f"%(?:25)*{byte:02x}" for byte in data) + ")"


def _unicode_escape(char: str) -> str:
    r"""A pattern that matches `\u00e9` or `\xe9`."""
    units = char.encode("utf-16-be", "surrogatepass")
    pairs = [units[i : i + 2].hex() for i in range(0, len(units), 2)]
    short = rf"|\\{{1,4}}x{ord(char):02x}" if ord(char) < 256 else rf"|\\{{1,4}}U{ord(char):08x}"
    return "(?i:" + "".join(rf"\\{{1,4}}u{pair}" for pair in pairs) + short + ")"
