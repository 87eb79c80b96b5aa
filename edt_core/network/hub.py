"""Whether the Hugging Face hub answers, asked once: its client tries for minutes, for each file of a model.

If the hub cannot be reached, models are loaded from this machine's hub cache alone (`local_files_only`).
"""

import re
from functools import cache
from pathlib import Path

from edt_core.network.answers import VARIABLE, answer_seconds, check_connects
from edt_core.printing.redaction import redacted

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_is_away(location: str | Path) -> bool:
    """Whether the hub, or its mirror of HF_ENDPOINT, gives no answer in time, or must not be asked (HF_HUB_OFFLINE).

    False for a location that is no hub id, for which nobody is asked, and where it is this question that fails: the
    hub's client has other certificates (SSL_CERT_FILE) and other proxies than the library that asks.
    """
    if Path(location).is_dir() or not HUB_ID.fullmatch(str(location)):
        return False
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        _ask(constants.ENDPOINT)
    except (requests.exceptions.SSLError, requests.exceptions.InvalidSchema):
        return False
    except Exception:  # of the HTTP library, or for the time-out
        return True
    return False


@cache  # an error is not kept: a hub that was away is asked again
def _ask(endpoint: str) -> None:
    import requests

    def ask() -> None:  # whatever it answers, its client judges it
        requests.get(endpoint, timeout=answer_seconds(), stream=True, allow_redirects=False).close()

    check_connects(ask, endpoint, "a Hugging Face hub", "")


def loading_failure(error: Exception, away: bool) -> Exception:
    """Why a model cannot be loaded; if the hub cannot be reached, its client only says that files are missing."""
    return ConnectionError(_absence()) if away and isinstance(error, OSError) else error


def _absence() -> str:
    """A sentence for a model that neither the hub nor this machine's cache of it can give."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = (
            f"the hub at {redacted(constants.ENDPOINT)} gave no answer in {answer_seconds():g} s "
            f"({VARIABLE}=60 waits longer for a slow one)"
        )
    return f"it is not complete in this machine's hub cache, and {reason}."
