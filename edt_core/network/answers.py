"""Whether a server says anything at all: asked before its client, which would wait minutes for one that is silent."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import TypeVar

from edt_core.errors import UserError
from edt_core.printing.redaction import redacted

Result = TypeVar("Result")

VARIABLE = "EDT_ANSWER_S"
_DEFAULT_S = 10.0
_WAITS_LONGER = f"{VARIABLE}=60 waits longer for a slow one"


def answer_seconds() -> float:
    """How long a server may take for its first words: EDT_ANSWER_S, or 10 s. Raises UserError for no such number."""
    text = os.environ.get(VARIABLE) or str(_DEFAULT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UserError(f"{VARIABLE} is {text!r}; a number of seconds above 0 was expected, as 10")
    return seconds


def in_background(work: Callable[[], Result]) -> "Future[Result]":
    """Have a thread do something; one that never ends does not keep the process from ending."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def no_answer(place: str, what: str, remedy: str) -> UserError:
    """The error for a server that was silent: `what` it should be, and what to do beside waiting longer."""
    return UserError(
        f"no answer in {answer_seconds():g} s from {redacted(place)}, where {what} was expected; {remedy}. "
        f"{_WAITS_LONGER}"
    )


def check_connects(connect: Callable[[], Result], place: str, what: str, remedy: str) -> Result:
    """What `connect` returns. Raises what it raises, and UserError where it takes longer than a server may."""
    try:
        return in_background(connect).result(answer_seconds())
    except TimeoutError as error:
        raise no_answer(place, what, remedy) from error


def check_http(url: str, what: str, remedy: str) -> None:
    """Raise UserError where a URL gives no answer in time; whatever the answer is, the server's own client judges it.

    So it does with a connection that is refused or a name that nobody knows: these it notices at once.
    """
    import requests

    def ask() -> None:
        requests.get(url, timeout=answer_seconds(), stream=True, allow_redirects=False).close()

    try:
        check_connects(ask, url, what, remedy)
    except requests.exceptions.Timeout as error:
        raise no_answer(url, what, remedy) from error
    except UserError:
        raise
    except (requests.exceptions.RequestException, ValueError, OSError):
        pass


def check_mlflow(uri: str) -> None:
    """Raise UserError where the MLflow server of a tracking URI is silent; of other kinds of URIs nothing is asked."""
    if uri.startswith(("http://", "https://")):
        remedy = "start the server, or mend MLFLOW_TRACKING_URI (--tracking-uri)"
        check_http(f"{uri.rstrip('/')}/health", "an MLflow server", remedy)


@cache  # an error is not kept: a server that was silent is asked again
def check_s3(endpoint: str) -> None:
    """Raise UserError where the S3 server at an endpoint is silent. Asked once in a process."""
    check_http(endpoint, "an S3 server", "start the server, or mend AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3")
