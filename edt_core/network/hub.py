"""Checks once whether the Hugging Face hub answers: its client retries for minutes, for each file of a model.

If the hub cannot be reached, models are loaded only from this machine's hub cache (`local_files_only`).
"""

import re
from functools import cache
from pathlib import Path

from edt_core.network.answers import VARIABLE, answer_seconds, check_connects
from edt_core.printing.redaction import redacted

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_is_away(location: str | Path) -> bool:
    """Whether the hub, or the mirror in HF_ENDPOINT, does not answer in time, or is disabled (HF_HUB_OFFLINE).

    False for a location that is not a hub id, without a request, and if only this check may fail: the hub's client uses
    other certificates (SSL_CERT_FILE) and other proxies than the library used here.
    """
    if Path(location).is_dir() or not HUB_ID.fullmatch(str(location)):
        return False
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        _check(constants.ENDPOINT)
    except (requests.exceptions.SSLError, requests.exceptions.InvalidSchema):
        return False
    except Exception:  # of the HTTP library, or for the time-out
        return True
    return False


@cache  # errors are not cached: the next call checks again
def _check(endpoint: str) -> None:
    import requests

    def request() -> None:  # any answer will do: the hub's client evaluates it
        requests.get(endpoint, timeout=answer_seconds(), stream=True, allow_redirects=False).close()

    check_connects(request, endpoint, "a Hugging Face hub", "")


def loading_failure(error: Exception, away: bool) -> Exception:
    """The reason why a model cannot be loaded: for an unreachable hub its client only reports missing files."""
    return ConnectionError(_absence()) if away and isinstance(error, OSError) else error


def _absence() -> str:
    """The message for a model that is available neither from the hub nor from this machine's cache."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = (
            f"the hub at {redacted(constants.ENDPOINT)} did not answer in {answer_seconds():g} s "
            f"({VARIABLE}=60 waits longer for a slow one)"
        )
    return f"it is not complete in this machine's hub cache, and {reason}."
