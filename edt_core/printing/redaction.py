"""Removes credentials from texts. All text that is recorded or shown goes through here.

Removed are: the values of environment variables whose names say that they are secret
(`edt_core.printing.secret_values`); the user and password before the `@` of a URL, and its query, which contains the
signature of signed URLs; and named credentials in the usual notations (`password=...`, `--token ...`,
`"api_key": "..."`, `Authorization: Bearer ...`).

A password in a URL should be percent-encoded, but often is not. If a text is ambiguous, the reading that redacts more
is used, with these limits:
- `scheme://user:password@`: the password starts after the first colon and ends at the last `@` before white space, so
  it may contain `@ / ? # : ' "`. An `@` in the path of such a URL counts as the password's end: the host is then lost.
- After a colon, up to five digits are a port if the URL has no `@` after them, or if they end at `/`, `?` or `#` after
  `localhost`, an IP address or a name with a dot: `http://127.0.0.1:9000/bucket/a@b.png` stays.
- White space is part of the password if no `@` comes before it, or if only a word follows that `@` and another `@`
  follows in the line. A password that starts with up to five digits and white space reads like a port.
- Without a colon, the text before an `@` is a token if it contains no `/ ? #`, quote or white space. So
  `s3://bucket/a@b.png`, `hf://datasets/x@main/y`, `git@host:path` and `me@example.org` stay. So do Azure's containers,
  as in `abfss://container@account.dfs.core.windows.net/path`.
- A URL in quotes ends at the closing quote: a host must precede that quote, and no letter may follow it.
"""

import re
from collections.abc import Mapping
from typing import Any

from edt_core.printing.secret_values import without_secret_values

REDACTED = "<redacted>"
_LONGEST = 2000  # characters of a user and password

_SCHEME = re.compile(r"\b[a-z][a-z0-9+.-]{0,30}://", re.IGNORECASE)
_END = re.compile(r"[\r\n]|[\s'\"<>(\[{,;|=][a-z][a-z0-9+.-]{0,30}://", re.IGNORECASE)  # of the line, or the next URL
_USER = re.compile(r"(?:[^\s/?#:'\"<>]|['\"](?=\w))*:(?=\S)")
_TOKEN = re.compile(r"[^\s/?#'\"<>]+@")
# Azure's `container@account`; such a URL never contains an account's key.
_CONTAINER = re.compile(r"(?:abfs|wasb|az)s?://[a-z0-9$-]{3,63}@[a-z0-9-]+\.(?:dfs|blob)\.", re.IGNORECASE)
_PORT = re.compile(r"\d{1,5}(?=$|[\s/?#'\"<>,;.)\]}\\|&])|(?=$|/)")
_PLAIN_HOST = re.compile(r"(?:.*@)?(?:localhost|\[[0-9a-f:.]+\]|[\w-]+(?:\.[\w-]+)+)", re.IGNORECASE)
_IPV6 = re.compile(r"\[[0-9a-f:.]+\](?::\d+)?(?![^\s/?#'\"])", re.IGNORECASE)
_CERTAIN_HOST = re.compile(r"localhost\b|\[|[\w-]+\.[\w.-]+|[\w.-]+(?::\d|[/?,;)\]}>'\"])", re.IGNORECASE)
_HOST = r"@[\w.\[\]:-]+(?:[/?#][^@]*)?"
_QUERY = re.compile(
    rf"(\b[a-z][a-z0-9+.-]{{0,30}}://(?:{REDACTED}@)?[^\s?#'\"<>]{{0,2000}}\?)(?:[^\s#'\"<>]|['\"](?=\w))+",
    re.IGNORECASE,
)

_KEY = r"(?:pass(?:word|wd|phrase)|secret|credentials?|(?:api|access|private|auth|secret)[_-]?key)"
_KEY = rf"(?:{_KEY}|(?:access|auth|session|refresh|bearer|security|api|id|hf)[_-]token|(?<![\w.])(?<![\w.]-)token)"
_NAME = rf"(?:[\w.-]{{0,80}}{_KEY})"
_MORE = r"[\w-]{0,80}"  # of a name; without a bound, the time for a long name would grow with its square
_WORD = r"(?:(?![,;)\]}](?:\s|$))[^\s'\"<>]|['\"](?=[^\s,;:)\]}>]))+"  # with quotes, but not the closing one
_VALUE = rf"(?:'(?!\s)(?:\\.|''|[^'\\\n])*'|\"(?!\s)(?:\\.|[^\"\\\n])*\"|{_WORD})"
_NAMED = (
    re.compile(
        rf"([?&#;](?:{_MORE}(?:token|signature|secret|password|credential|api_?key|access_?key){_MORE}|sig)=)"
        r"[^&\s#'\"<>]+",
        re.IGNORECASE,
    ),
    re.compile(rf"({_KEY}[ \t]*=[ \t]*){_VALUE}", re.IGNORECASE),
    re.compile(rf"((?<!\S)--{_NAME}[ \t]+)(?!-){_VALUE}", re.IGNORECASE),
    re.compile(rf"((['\"])--{_NAME}\2, *(['\"]))(?:\\.|(?!\3)[^\\\n])+", re.IGNORECASE),
    re.compile(rf"((['\"]){_NAME}\\?\2\s*:\s*\\?(['\"]))(?:\\.|(?!\3)[^\\\n])+", re.IGNORECASE),
    re.compile(r"(\b(?:proxy-)?authorization\b\\?['\"]?\s*[:=]\s*\\?['\"]?)(?:[a-z][\w-]*[ ]+)?[^\s'\"<>,\\]+", re.I),
    re.compile(rf"(\bx-{_MORE}(?:key|token|secret)\b\\?['\"]?\s*:\s*\\?['\"]?)[^\s'\"<>,\\]+", re.IGNORECASE),
    re.compile(r"(\b(?:set-)?cookie\\?['\"]?: *\\?['\"]?)[^\r\n'\"<>\\]+", re.IGNORECASE),
    re.compile(r"(\bbearer +)(?=\S*\d)[\w.~+/=-]{8,}", re.IGNORECASE),
)
_SECRET_KEY = re.compile(_NAME, re.IGNORECASE)


def redacted(text: str) -> str:
    """A text without credentials: `https://me:pw@host/w.pth?sig=1` becomes `https://<redacted>@host/w.pth?<redacted>`.

    Bytes of a file name that are not UTF-8 become `\\udcff`: records and terminals cannot contain them.
    """
    return _without_credentials(text).encode("utf-8", "backslashreplace").decode()


def holds_parameters(text: str) -> str | None:
    """The first parameter whose value `redacted` removes, such as `?token=`, or None."""
    return next((match[1] for pattern in _NAMED if (match := pattern.search(text))), None)


def redacted_values(value: Any) -> Any:
    """JSON values without credentials. File names that are not UTF-8 stay: JSON and YAML can contain them.

    Any text under a key such as `password` or `auth_token` is a credential.
    """
    if isinstance(value, str):
        return _without_credentials(value)
    if isinstance(value, Mapping):
        return {key: _redacted_item(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted_values(item) for item in value)
    return value


def _redacted_item(key: Any, item: Any) -> Any:
    if isinstance(item, str) and item and isinstance(key, str) and _SECRET_KEY.fullmatch(key):
        return without_secret_values(item) if item.startswith("<") else REDACTED
    return redacted_values(item)


def _without_credentials(text: str) -> str:
    text = without_secret_values(text)
    if "://" in text:
        text = _QUERY.sub(rf"\1{REDACTED}", _without_users(text))
    for pattern in _NAMED:
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text


def _without_users(text: str) -> str:
    """A text with users and passwords removed from its URLs."""
    parts, done = [], 0
    while match := _SCHEME.search(text, done):
        start = match.end()
        end = _END.search(text, start, start + _LONGEST)
        rest = text[start : end.start() if end else start + _LONGEST]
        length = 0
        if not _CONTAINER.match(text, match.start()):
            length = _user_length(_unquoted(rest, text[match.start() - 1 : match.start()]))
        parts += [text[done:start], f"{REDACTED}@" if length else ""]
        done = start + length
    return "".join([*parts, text[done:]])


def _unquoted(rest: str, quote: str) -> str:
    """The text after `scheme://`, up to the closing quote if `quote` opens the URL."""
    if quote in ("'", '"'):
        closed = re.search(rf"(?:{_HOST}|^[^\s/?#:'\"@]*:\d{{1,5}})(?={quote}(?:$|[\s,;:)\]}}>.]))", rest)
        return rest[: closed.end()] if closed else rest
    return rest


def _user_length(rest: str) -> int:
    """Number of characters after `scheme://` that are user, password and `@`; 0 if there are none."""
    user = _USER.match(rest)
    if user is None or _IPV6.match(rest) or _is_port(user[0][:-1], rest[user.end() :]):
        token = _TOKEN.match(rest)
        return token.end() if token else 0
    word = re.split(r"\s", rest, maxsplit=1)[0]
    at, last = word.rfind("@"), rest.rfind("@")
    if at >= user.end() and (at == last or _CERTAIN_HOST.match(word, at + 1)):
        return at + 1
    return last + 1 if last >= user.end() else 0


def _is_port(host: str, rest: str) -> bool:
    """Whether a port, and no password, follows the colon after a host."""
    port = _PORT.match(rest)
    if port is None:
        return False
    if "@" not in re.split(r"\s", rest, maxsplit=1)[0]:
        return True
    return rest[port.end() : port.end() + 1] in tuple("/?#") and _PLAIN_HOST.fullmatch(host) is not None
