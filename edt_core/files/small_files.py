"""Reading of small untrusted files such as configurations and records: only regular files of bounded size.

A path may name a FIFO, a device or a sparse file of ten gigabytes: reading it would never end, or take all memory.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edt_core.errors import UserError

MAX_CONFIG_BYTES = 4 << 20  # of a configuration in YAML: the names of ImageNet-21k's classes take about 600 KiB
MAX_RECORD_BYTES = 128 << 20  # of a manifest or another record: 10,000 quarantined images take about 2 MiB
MAX_LABELS_BYTES = 1 << 30  # of a labels file: the 14 million images of ImageNet-21k take about 800 MiB

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnusableFileError(UserError):
    """A file that is not regular, is too large, or does not contain the expected text."""


def read_bounded(
    path: str | os.PathLike[str],
    limit: int = MAX_RECORD_BYTES,
    check: Callable[[os.stat_result], None] = lambda status: None,
) -> bytes:
    """Read a regular file. Raises UnusableFileError for anything else or more than `limit` bytes; OSError.

    `check` gets the status of the open file before its bytes are read, and raises to reject it.
    """
    check_regular(path, os.stat(path), limit)
    # A FIFO that replaces the file in the meantime is opened without blocking, and rejected.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        check_regular(path, status, limit)
        check(status)
        return within(file.read(limit + 1), path, limit)


def check_regular(path: str | os.PathLike[str], status: os.stat_result, limit: int) -> None:
    """Raise UnusableFileError unless `status` is that of a regular file of at most `limit` bytes."""
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "not a regular file")
        raise UnusableFileError(
            f"{os.fspath(path)} is {kind}, but a regular file is expected; give or restore the file"
        )
    if status.st_size > limit:
        raise _too_large(path, f"{status.st_size:,}", limit)


def within(data: bytes, where: str | os.PathLike[str], limit: int) -> bytes:
    """Return the same bytes. Raises UnusableFileError if there are more than `limit`."""
    if len(data) > limit:
        raise _too_large(where, f"more than {limit:,}", limit)
    return data


def _too_large(where: str | os.PathLike[str], size: str, limit: int) -> UnusableFileError:
    return UnusableFileError(
        f"{os.fspath(where)} has {size} bytes, but such a file may have at most {limit:,}; check that it is the right "
        "file"
    )


def as_utf8(data: bytes, where: str | os.PathLike[str]) -> str:
    """Bytes as text, without the byte order mark of some editors. Raises UnusableFileError for other encodings."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableFileError(
            f"{os.fspath(where)} is not UTF-8 text: byte {data[error.start]:#04x} at position {error.start}; save it "
            "as UTF-8, for example with iconv -f latin1 -t utf-8"
        ) from error


def read_text(path: str | os.PathLike[str], limit: int = MAX_RECORD_BYTES) -> str:
    """The text of a regular file in UTF-8. Raises UnusableFileError and OSError as `read_bounded` and `as_utf8`."""
    return as_utf8(read_bounded(path, limit), path)


def parse_json(
    text: bytes | str,
    where: str | os.PathLike[str],
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> Any:
    """The value of a JSON text. Raises UnusableFileError for invalid JSON, deep nesting, and numbers too long to read.

    `pairs` creates objects, like `object_pairs_hook` of `json.loads`; its UserErrors pass unchanged.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except UserError:
        raise
    except RecursionError as error:
        raise UnusableFileError(
            f"{os.fspath(where)} is not usable JSON: it is nested too deep; correct the file"
        ) from error
    except ValueError as error:
        raise UnusableFileError(f"{os.fspath(where)} is not JSON ({error}); correct the file") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file. Raises UnusableFileError and OSError as `read_bounded` and `parse_json`."""
    return parse_json(read_bounded(path), path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UnusableFileError for another value, and as `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UnusableFileError(
            f"{path} contains a JSON {type(value).__name__}, but an object is expected; correct the file"
        )
    return value
