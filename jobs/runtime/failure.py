"""The cause of a failure in one sentence, and its remedy. The traceback goes into a log file."""

import errno
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edt_core.errors import UserError
from edt_core.printing.console import printable, say
from edt_core.printing.redaction import redacted
from edt_core.store.errors import UNUSABLE_PATHS

_LONGEST = 400  # characters of a cause: some libraries put a page of text into a message
_RESUME = "finished work is kept: rerun the same command to resume"


@dataclass(frozen=True)
class Failure:
    """What went wrong, and the remedy; the remedy is empty if the cause contains it, as in a UserError."""

    cause: str
    remedy: str = ""


def explained(error: BaseException) -> Failure:
    """The failure in plain words, without credentials."""
    if isinstance(error, UserError):
        return Failure(redacted(str(error)))
    name = type(error).__name__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    cause = redacted(f"{name}: {first}" if first else name)
    remedy = next((text for fits, text in _REMEDIES if fits(error)), _UNKNOWN)
    return Failure(cause if len(cause) <= _LONGEST else f"{cause[:_LONGEST]} ...", remedy)


def kept_traceback(error: BaseException, folder: Path | None = None) -> Path:
    """Write the full traceback of an error to a new file in `folder` or the temporary folder; return its path."""
    text = printable(redacted("".join(traceback.format_exception(error))))
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix=f"edt-{stamp}-", suffix=".log", dir=folder, delete=False
    ) as file:
        file.write(text)
    return Path(file.name)


def tell_failure(error: BaseException, raised: BaseException | None = None) -> int:
    """Print what went wrong on standard error; return the exit code: 2 for a user's mistake, 1 for a failure.

    An MLflow that does not answer counts as a user's mistake: its address may be wrong, and no work was started.
    The traceback goes into a file: that of `raised`, if the error was unwrapped from it.
    """
    failure = explained(error)
    if isinstance(error, OSError) and (reason := UNUSABLE_PATHS.get(error.errno or 0)):
        say(f"error: cannot use {redacted(str(error.filename))[:_LONGEST]}: {reason}", err=True)
        return 2
    if _from_mlflow(error):
        say(f"error: MLflow does not answer, or rejects the request: {failure.cause}; {failure.remedy}", err=True)
        return 2
    say(f"error: {failure.cause}", err=True)
    if isinstance(error, UserError):
        return 2
    say(f"       {failure.remedy}\n       log: {kept_traceback(raised or error)}", err=True)
    return 1


def _named(*names: str) -> Callable[[BaseException], bool]:
    """A test whether an error's class has one of these names. It does not import the library of the class."""
    return lambda error: any(cls.__name__ in names for cls in type(error).__mro__)


def _from_mlflow(error: BaseException) -> bool:
    return type(error).__module__.startswith("mlflow.")


def _no_device_memory(error: BaseException) -> bool:
    return type(error).__module__.startswith("torch") and type(error).__name__ == "OutOfMemoryError"


def _disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


_UNKNOWN = f"a bug in this program or in a library it uses: the traceback in the log shows where; {_RESUME}"

_REMEDIES: tuple[tuple[Callable[[BaseException], bool], str], ...] = (
    (
        _no_device_memory,
        "lower the step's batch size (train.micro_batch_size, encode.batch_size, ...), or use a GPU with more memory",
    ),
    (
        _named("OutOfMemoryError"),
        "a node ran out of memory: lower the step's num_workers or batch size, or add memory to the node",
    ),
    (
        _named("WorkerCrashedError", "RayActorError", "ActorDiedError", "NodeDiedError"),
        f"a worker process was lost, usually for lack of memory: the log has its last lines; {_RESUME}",
    ),
    (
        _named("WorkerGroupError", "ControllerError", "TrainingFailedError"),
        f"training workers failed: the log has the error of each; {_RESUME}",
    ),
    (
        _disk_full,
        "free space on that disk (`edt gc` moves artifacts that no model needs to a trash, `edt gc --empty-trash` "
        f"deletes them); {_RESUME}",
    ),
    (
        _named("PermissionError"),
        "give the user that runs this command permission to read and write there, or choose another folder",
    ),
    (_from_mlflow, "check MLFLOW_TRACKING_URI and the server at that address"),
    (
        _named("ConnectionError", "TimeoutError", "EndpointConnectionError", "ClientError"),
        f"check the network and the server; {_RESUME}",
    ),
    (_named("MemoryError"), "the machine ran out of memory: lower the step's num_workers or batch size"),
)
