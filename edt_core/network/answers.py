"""Checks whether a server answers at all, because its client would wait minutes for one that does not."""

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
    """Time limit for a server's first answer: EDT_ANSWER_S, or 10 s. Raises UserError for an invalid value."""
    text = os.environ.get(VARIABLE) or str(_DEFAULT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UserError(f"{VARIABLE} is {text!r}; it must be a number of seconds above 0, such as 10")
    return seconds


def in_background(work: Callable[[], Result]) -> "Future[Result]":
    """Run `work` in a thread, which does not keep the process from ending even if it never finishes."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def no_answer(place: str, what: str, remedy: str) -> UserError:
    """The error for a server that did not answer: `what` was expected there, and the remedy besides waiting longer."""
    return UserError(
        f"no answer in {answer_seconds():g} s from {redacted(place)}, where {what} was expected; {remedy}. "
        f"{_WAITS_LONGER}"
    )


def check_connects(connect: Callable[[], Result], place: str, what: str, remedy: str) -> Result:
    """Return the result of `connect`. Raises its exceptions, and UserError if it exceeds the time limit."""
    try:
        return in_background(connect).result(answer_seconds())
    except TimeoutError as error:
        raise no_answer(place, what, remedy) from error


def check_http(url: str, what: str, remedy: str) -> None:
    """Raise UserError if a URL does not answer in time. Any answer is accepted: the server's client evaluates it.

    Refused connections and unknown host names are also left to the client, which reports them at once.
    """
    import requests

    def request() -> None:
        requests.get(url, timeout=answer_seconds(), stream=True, allow_redirects=False).close()

    try:
        check_connects(request, url, what, remedy)
    except requests.exceptions.Timeout as error:
        raise no_answer(url, what, remedy) from error
    except UserError:
        raise
    except (requests.exceptions.RequestException, ValueError, OSError):
        pass


def check_mlflow(uri: str) -> None:
    """Raise UserError if the MLflow server of a tracking URI does not answer. Other kinds of URI are not checked."""
    if uri.startswith(("http://", "https://")):
        remedy = "start the server, or correct MLFLOW_TRACKING_URI (--tracking-uri)"
        check_http(f"{uri.rstrip('/')}/health", "an MLflow server", remedy)


@cache  # errors are not cached: the next call checks again
def check_s3(endpoint: str) -> None:
    """Raise UserError if the S3 server at an endpoint does not answer. Checked once per process."""
    check_http(endpoint, "an S3 server", "start the server, or correct AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3")
