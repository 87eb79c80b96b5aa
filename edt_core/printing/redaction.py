"""Credentials out of texts: whatever is recorded or shown goes through here first.

Known are: the values of environment variables whose names say that they are secret
(`edt_core.printing.secret_values`); what a URL carries beside its place, which is a user and password before the `@`,
and its query, where signed URLs have their signature; and the usual ways to write a credential with its name
(`password=...`, `--token ...`, `"api_key": "..."`, `Authorization: Bearer ...`).

A password in a URL should be percent-encoded, and often is not. Where a text can be read in two ways, the one that
redacts more is taken, with these limits:
- `scheme://user:password@`: the password begins after the first colon and ends at the last `@` before white space, so
  it may hold `@ / ? # : ' "`. An `@` in the path of such a URL is taken for the password's end: the host is lost then.
- After a colon, up to five digits are a port where the URL has no `@` after them, and where they end at `/`, `?` or `#`
  behind `localhost`, an IP address or a name with a dot: `http://127.0.0.1:9000/bucket/a@b.png` stays.
- White space belongs to the password where no `@` comes before it, or where what follows that `@` is a word alone and
  another `@` comes in the line. A password that begins with up to five digits and white space reads like a port.
- Without a colon, what stands before an `@` is a token if no `/ ? #`, quote or white space is in it. Hence
  `s3://bucket/a@b.png`, `hf://datasets/x@main/y`, `git@host:path` and `me@example.org` stay. So does what Azure puts
  there, as `abfss://container@account.dfs.core.windows.net/path`.
- A URL in quotes ends at the quote that closes it: a host must stand before that quote, and no letter after it.
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
# Azure's `container@account`; an account's key never stands in such a URL.
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
_MORE = r"[\w-]{0,80}"  # of a name; without a bound, what strings names together would take the square of its length
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

    Bytes of a file name that are not UTF-8 become `\\udcff`: no record and no terminal takes them as they are.
    """
    return _without_credentials(text).encode("utf-8", "backslashreplace").decode()


def holds_parameters(text: str) -> str | None:
    """The name of a parameter whose value `redacted` leaves out, as `?token=`; None where there is none."""
    return next((found[1] for pattern in _NAMED if (found := pattern.search(text))), None)


def redacted_values(value: Any) -> Any:
    """JSON values without credentials. File names that are not UTF-8 stay: JSON and YAML can write them.

    A text under a key as `password` or `auth_token` is a credential whatever it is.
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
    """A text whose URLs have no user and no password."""
    parts, done = [], 0
    while found := _SCHEME.search(text, done):
        start = found.end()
        end = _END.search(text, start, start + _LONGEST)
        rest = text[start : end.start() if end else start + _LONGEST]
        length = 0
        if not _CONTAINER.match(text, found.start()):
            length = _user_length(_unquoted(rest, text[found.start() - 1 : found.start()]))
        parts += [text[done:start], f"{REDACTED}@" if length else ""]
        done = start + length
    return "".join([*parts, text[done:]])


def _unquoted(rest: str, quote: str) -> str:
    """What follows `scheme://`, up to the quote that closes the URL, where one opens it."""
    if quote in ("'", '"'):
        closed = re.search(rf"(?:{_HOST}|^[^\s/?#:'\"@]*:\d{{1,5}})(?={quote}(?:$|[\s,;:)\]}}>.]))", rest)
        return rest[: closed.end()] if closed else rest
    return rest


def _user_length(rest: str) -> int:
    """Characters of what follows `scheme://` that are user, password and `@`; 0 where there are none."""
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
