"""Small files that others may have written, configurations and records: read whole, from regular files of bounded size.

A path may name a FIFO, a device or ten gigabytes of nothing: reading those would never end, or take all memory.
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
    """A file that is not a regular one, is too large, or does not hold the text that is expected."""


def read_bounded(
    path: str | os.PathLike[str],
    limit: int = MAX_RECORD_BYTES,
    check: Callable[[os.stat_result], None] = lambda about: None,
) -> bytes:
    """The bytes of a regular file. Raises UnusableFileError for anything else or more than `limit` bytes; OSError.

    `check` gets the status of the file that is open, before its bytes are read, and raises to refuse it.
    """
    check_regular(path, os.stat(path), limit)
    # A FIFO that takes the file's place meanwhile is opened without waiting, and refused.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        about = os.fstat(handle)
        check_regular(path, about, limit)
        check(about)
        return within(file.read(limit + 1), path, limit)


def check_regular(path: str | os.PathLike[str], about: os.stat_result, limit: int) -> None:
    """Raise UnusableFileError unless `about` is of a regular file of at most `limit` bytes."""
    if not stat.S_ISREG(about.st_mode):
        kind = next((name for fits, name in _KINDS if fits(about.st_mode)), "no plain file")
        raise UnusableFileError(
            f"{os.fspath(path)} is {kind}, and a regular file is expected; give or restore the file"
        )
    if about.st_size > limit:
        raise _too_large(path, f"{about.st_size:,}", limit)


def within(data: bytes, where: str | os.PathLike[str], limit: int) -> bytes:
    """The same bytes. Raises UnusableFileError where there are more than `limit`."""
    if len(data) > limit:
        raise _too_large(where, f"more than {limit:,}", limit)
    return data


def _too_large(where: str | os.PathLike[str], size: str, limit: int) -> UnusableFileError:
    return UnusableFileError(
        f"{os.fspath(where)} has {size} bytes, and at most {limit:,} are read of such a file; check that it is the "
        "file that is meant"
    )


def as_utf8(data: bytes, where: str | os.PathLike[str]) -> str:
    """Bytes as text, without the byte order mark of some editors. Raises UnusableFileError for other encodings."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableFileError(
            f"{os.fspath(where)} is not UTF-8 text: byte {data[error.start]:#04x} at position {error.start}; save it "
            "as UTF-8, as by iconv -f latin1 -t utf-8"
        ) from error


def read_text(path: str | os.PathLike[str], limit: int = MAX_RECORD_BYTES) -> str:
    """The text of a regular file in UTF-8. Raises UnusableFileError and OSError as `read_bounded` and `as_utf8`."""
    return as_utf8(read_bounded(path, limit), path)


def parse_json(
    text: bytes | str,
    where: str | os.PathLike[str],
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> Any:
    """The value of a JSON text. Raises UnusableFileError: no JSON, nested too deep, a number of thousands of digits.

    `pairs` makes the objects, as `object_pairs_hook` of `json.loads`; what it raises as UserError passes.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except UserError:
        raise
    except RecursionError as error:
        raise UnusableFileError(f"{os.fspath(where)} is not usable JSON: it is nested too deep; mend it") from error
    except ValueError as error:
        raise UnusableFileError(f"{os.fspath(where)} is not JSON ({error}); mend it") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file. Raises UnusableFileError and OSError as `read_bounded` and `parse_json`."""
    return parse_json(read_bounded(path), path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UnusableFileError for another value, and as `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UnusableFileError(f"{path} holds no JSON object but a {type(value).__name__}; mend it")
    return value
