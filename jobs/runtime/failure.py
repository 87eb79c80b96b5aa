"""Why something failed, in one sentence, and what to do about it: a traceback is for the log."""

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

_LONGEST = 400  # characters of a cause: some libraries put a page into a message
_GO_ON = "finished work is kept: rerun the same command to resume"


@dataclass(frozen=True)
class Failure:
    """What went wrong, and the remedy; the remedy is empty where the cause says it itself, as a UserError does."""

    cause: str
    remedy: str = ""


def explained(error: BaseException) -> Failure:
    """The failure in a person's words. Credentials are left out."""
    if isinstance(error, UserError):
        return Failure(redacted(str(error)))
    name = type(error).__name__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    cause = redacted(f"{name}: {first}" if first else name)
    remedy = next((text for fits, text in _REMEDIES if fits(error)), _UNKNOWN)
    return Failure(cause if len(cause) <= _LONGEST else f"{cause[:_LONGEST]} ...", remedy)


def kept_traceback(error: BaseException, folder: Path | None = None) -> Path:
    """Write the whole traceback of an error to a new file in `folder` (one for temporary files) and return its path."""
    text = printable(redacted("".join(traceback.format_exception(error))))
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix=f"edt-{stamp}-", suffix=".log", dir=folder, delete=False
    ) as file:
        file.write(text)
    return Path(file.name)


def tell_failure(error: BaseException, raised: BaseException | None = None) -> int:
    """Say on standard error what went wrong; returns the exit code: 2 for a user's mistake, 1 for a failure.

    An MLflow that does not answer is a wrong request: its address may be, and nothing was begun.
    The traceback, that of `raised` where the error came wrapped, goes into a file.
    """
    failure = explained(error)
    if isinstance(error, OSError) and (reason := UNUSABLE_PATHS.get(error.errno or 0)):
        say(f"error: cannot use {redacted(str(error.filename))[:_LONGEST]}: {reason}", err=True)
        return 2
    if _from_mlflow(error):
        say(f"error: MLflow does not answer, or refuses: {failure.cause}; {failure.remedy}", err=True)
        return 2
    say(f"error: {failure.cause}", err=True)
    if isinstance(error, UserError):
        return 2
    say(f"       {failure.remedy}\n       log: {kept_traceback(raised or error)}", err=True)
    return 1


def _named(*names: str) -> Callable[[BaseException], bool]:
    """Whether an error is of a class of one of these names: its library need not be imported to ask."""
    return lambda error: any(cls.__name__ in names for cls in type(error).__mro__)


def _from_mlflow(error: BaseException) -> bool:
    return type(error).__module__.startswith("mlflow.")


def _no_device_memory(error: BaseException) -> bool:
    return type(error).__module__.startswith("torch") and type(error).__name__ == "OutOfMemoryError"


def _disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


_UNKNOWN = f"a fault of the program, or of a library it uses: the traceback in the log says where; {_GO_ON}"

_REMEDIES: tuple[tuple[Callable[[BaseException], bool], str], ...] = (
    (
        _no_device_memory,
        "lower the step's batch size (train.micro_batch_size, encode.batch_size, ...), or use a GPU with more memory",
    ),
    (
        _named("OutOfMemoryError"),
        "a node had no memory left: lower the step's num_workers or batch size, or give it more memory",
    ),
    (
        _named("WorkerCrashedError", "RayActorError", "ActorDiedError", "NodeDiedError"),
        f"a worker process was lost: the log has its last lines, and memory is the usual cause; {_GO_ON}",
    ),
    (
        _named("WorkerGroupError", "ControllerError", "TrainingFailedError"),
        f"training workers failed: the log has what each of them raised; {_GO_ON}",
    ),
    (
        _disk_full,
        "free space on that disk (`edt gc` moves what no model needs to a trash, `edt gc --empty-trash` deletes that), "
        f"then run again: {_GO_ON}",
    ),
    (
        _named("PermissionError"),
        "give the user that runs this the right to read and write there, or name another folder",
    ),
    (_from_mlflow, "see to MLFLOW_TRACKING_URI and the server it names"),
    (
        _named("ConnectionError", "TimeoutError", "EndpointConnectionError", "ClientError"),
        f"see to the network and the server; {_GO_ON}",
    ),
    (_named("MemoryError"), "the machine has no memory left: lower the step's num_workers or batch size"),
)
