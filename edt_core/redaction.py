"""Credentials out of texts: whatever is recorded or shown goes through here first.

Two kinds are known: the values of environment variables whose names say that they are secret, and what a URL carries
beside its place: a user and password before the `@`, and its query, where signed URLs have their signature.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|ACCESS_KEY|API_?KEY|PRIVATE_KEY|AUTH_KEY|CONNECTION_STRING"
)
_SHORTEST = 6  # characters: a shorter value is a word that texts have for other reasons
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?#'\"<>]*\?)[^\s#'\"<>]+", re.IGNORECASE)
_PARAMETER = re.compile(
    r"([?&](?:[\w-]*(?:token|signature|secret|password|credential|api_?key|access_?key)[\w-]*|sig)=)[^&\s#'\"<>]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """A text without credentials: `https://me:pw@host/w.pth?sig=1` becomes `https://<redacted>@host/w.pth?<redacted>`.

    Bytes of a file name that are not UTF-8 become `\\udcff`: no record and no terminal takes them as they are.
    """
    return _without_credentials(text).encode("utf-8", "backslashreplace").decode()


def holds_parameters(text: str) -> str | None:
    """The name of the first parameter whose value `redacted` leaves out, as `?token=`; None where there is none."""
    found = _PARAMETER.search(text)
    return None if found is None else found[1]


def _without_credentials(text: str) -> str:
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, f"<{name}>")
    if "://" in text:
        text = _USER.sub(rf"\1{REDACTED}@", _QUERY.sub(rf"\1{REDACTED}", text))
    return _PARAMETER.sub(rf"\1{REDACTED}", text) if "=" in text else text


def redacted_values(value: Any) -> Any:
    """JSON values without credentials. File names that are not UTF-8 stay: JSON and YAML can write them."""
    if isinstance(value, str):
        return _without_credentials(value)
    if isinstance(value, Mapping):
        return {key: redacted_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted_values(item) for item in value)
    return value
