"""The files of a source, on a disk or in a store that fsspec opens.

File names are bytes, relative to the folder of the source and with `/`: a Linux name need not be UTF-8.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, BinaryIO

from edt_core.data.images import image_extensions
from edt_core.errors import UserError
from edt_core.printing.redaction import redacted
from edt_core.store.errors import clear_remote_errors
from edt_core.store.folder import Folder

IMAGES = "files with an extension that the installed Pillow decodes, such as .jpg, .png, .webp or .avif"
THREADS = 8
SHOWN = 10  # names that a message lists
CREDENTIALS = re.compile(r"://[^/@\s:]*:(?!\d+/)\S*@")  # user:password@, but not a port or an Azure container


def shown(text: str) -> str:
    """A URI, or a message with URIs, without their credentials: `user:password@` and queries."""
    text = CREDENTIALS.sub("://", text)
    return re.sub(r"(://[^\s?]*)\?[^\s'\"]*", r"\1", text)


def as_text(name: bytes) -> str:
    """A file name as UTF-8 text; other bytes as `\\xff`, so that JSON can contain it."""
    return name.decode("utf-8", "backslashreplace")


def some(names: Sequence[bytes | str]) -> str:
    """The first ten names and the number of the others, for a message."""
    first = ", ".join(repr(as_text(name) if isinstance(name, bytes) else name) for name in names[:SHOWN])
    return f"{first} and {len(names) - SHOWN} more" if len(names) > SHOWN else first


def extension(name: bytes) -> str:
    """The extension of a file name, in lower case and with its dot; empty if there is none."""
    stem, dot, end = name.rpartition(b"/")[2].rpartition(b".")
    return as_text(dot + end.lower()) if stem else ""


def is_image(name: bytes) -> bool:
    """Whether a file name has the extension of an image. It runs for every file of a source, so it does little."""
    return name[name.rfind(b".") :].lower() in _image_endings()


@cache
def _image_endings() -> frozenset[bytes]:
    return frozenset(ending.encode() for ending in image_extensions())


def by_extension(counts: Mapping[str, int]) -> str:
    """`12 .txt, 3 without extension`: counts of files for a message, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    first = ", ".join(f"{count} {ending or 'without extension'}" for ending, count in ordered[:SHOWN])
    return f"{first} and {len(ordered) - SHOWN} other extensions" if len(ordered) > SHOWN else first


@contextmanager
def read_errors(where: str) -> Iterator[None]:
    """Turn faults of the disk or the store while a source is listed into UserError. `where` is a path or a URI."""
    where = shown(where)
    try:
        with clear_remote_errors(where) if "://" in where else nullcontext():
            yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"the source {where} does not exist; check the address") from error
    except Exception as error:  # each store has its own exception classes
        if not isinstance(error, OSError | ValueError) and type(error).__module__ == "builtins":
            raise
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {shown(redacted(str(error)))}"
        raise UserError(f"cannot read {where}: {reason}; check the address and the access") from error


def remote(folder: Folder) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a remote folder."""
    fs, path = folder.filesystem()
    return fs, str(path).rstrip("/")


def remote_path(path: str, name: bytes) -> str:
    """Path of a file in a store, where names are always text."""
    return f"{path}/{name.decode('utf-8', 'surrogateescape')}"


def open_file(root: Folder, name: bytes, block_size: int = 0) -> BinaryIO:
    """Open a file of the source. A remote one is read in blocks of `block_size` bytes; 0 reads exactly each request."""
    if (path := root.local) is not None:
        return open(os.path.join(os.fsencode(path), name), "rb")
    fs, base = remote(root)
    cache: dict[str, Any] = {"cache_type": "readahead", "block_size": block_size} if block_size else {}
    file: BinaryIO = fs.open(remote_path(base, name), "rb", **(cache or {"cache_type": "none"}))
    return file


@contextmanager
def opened(root: Folder, name: bytes, block_size: int = 0) -> Iterator[BinaryIO]:
    """`open_file` while a source is listed: raises UserError if the file cannot be read."""
    with read_errors(f"{root.uri}/{as_text(name)}"), open_file(root, name, block_size) as file:
        yield file
