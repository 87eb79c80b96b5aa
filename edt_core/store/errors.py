"""Turns errors of disks and object stores into one clear message: problem, place, remedy; never a credential."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from edt_core.errors import StoreUnavailableError, UserError
from edt_core.files.small_files import UnusableFileError

VARIABLES = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL"

_SPACE = {
    errno.ENOSPC: "no space is left on the device; free some and rerun",
    errno.EDQUOT: "the disk quota is used up; free some and rerun",
}
_PLACE = {
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "operation not permitted; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.EEXIST: "a part of this path is a file; choose another",
}
UNUSABLE_PATHS = {
    errno.ENAMETOOLONG: "the path, or a name in it, is too long for the file system; give a shorter one",
    errno.ELOOP: "a loop of symbolic links; remove the link, or change its target",
    errno.EISDIR: "it is a folder, but a file is expected; give the file",
}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
    "DefaultCredentialsError",
}
_THROTTLED = {"SlowDown", "503", "ServiceUnavailable", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
_UNREACHABLE = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "ProxyConnectionError",
    "SSLError",
    "ClientConnectorError",
    "FSTimeoutError",
}


@contextmanager
def clear_disk_errors(where: str) -> Iterator[None]:
    """Turn an error of a local file system during a write into UserError."""
    try:
        yield
    except OSError as error:
        reason = {**UNUSABLE_PATHS, **_SPACE, **_PLACE}.get(error.errno or 0)
        if reason is None:
            raise
        raise UserError(f"cannot write to {where}: {reason}") from error


@contextmanager
def clear_read_errors(where: str) -> Iterator[None]:
    """Turn a missing permission to read a local file, or an impossible path, into UserError."""
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"cannot read {where}: permission denied; change its permissions, or run as a user who may read it"
        ) from error
    except OSError as error:
        reason = UNUSABLE_PATHS.get(error.errno or 0)
        if reason is None:
            raise
        raise UnusableFileError(f"cannot read {where}: {reason}") from error


@contextmanager
def clear_space_errors(where: str) -> Iterator[None]:
    """Turn a full disk into UserError, for any library's wording; other errors pass unchanged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _SPACE.get(error.errno or 0) if isinstance(error, OSError) else None
        if reason is None and ("os error 28" in str(error) or "No space left on device" in str(error)):
            reason = _SPACE[errno.ENOSPC]  # safetensors and torch raise their own exception classes
        if reason is None:
            raise
        raise UserError(f"cannot write to {where}: {reason}") from error


@contextmanager
def clear_remote_errors(uri: str) -> Iterator[None]:
    """Turn errors of an object store into UserError. FileNotFoundError passes for a file, but not for a bucket."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if reason := _passing_reason(error):
            raise StoreUnavailableError(f"cannot use {uri}: {reason}") from error
        reason = _remote_reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot use {uri}: {reason}") from error


def _passing_reason(error: Exception) -> str | None:
    """Reason and remedy of an error that may be gone in a while; None for others."""
    code, names = error_code(error), {base.__name__ for base in type(error).__mro__}
    if code in _THROTTLED:
        return f"the store refuses so many requests ({code}); rerun later, or use fewer workers"
    return _unreachable(error) if names & _UNREACHABLE else None


def _unreachable(error: Exception) -> str:
    return f"the store cannot be reached ({type(error).__name__}); check the network and, for S3, AWS_ENDPOINT_URL"


def _remote_reason(error: Exception) -> str | None:
    """Reason and remedy; None for errors not about access. Exceptions are matched by name, not imported."""
    code, names = error_code(error), {base.__name__ for base in type(error).__mro__}
    if code == "NoSuchBucket":
        return "there is no such bucket; create it, or correct the URI or AWS_ENDPOINT_URL"
    if code == "RequestTimeTooSkewed":
        return f"the clock of {socket.gethostname()} differs too much from that of the store; set it, such as by NTP"
    if names & _NO_CREDENTIALS:
        return f"no credentials were found ({type(error).__name__}); set those of your store, for S3 {VARIABLES}"
    if isinstance(error, PermissionError) and not error.filename:  # a local file has a filename
        return f"access denied{f' ({code})' if code else ''}; check the rights of these credentials, for S3 {VARIABLES}"
    return _unreachable(error) if "Invalid endpoint" in str(error) else None


def error_code(error: BaseException) -> str:
    """The store's error code, such as NoSuchBucket, or "" if the error has none."""
    for part in (error, error.__cause__):
        response = getattr(part, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""
