"""The files of a source, on a disk or in a store that fsspec opens.

File names are bytes, relative to the folder of the source and with `/`: a Linux name need not be UTF-8.
"""

import errno
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from edt_core.data.images import image_extensions
from edt_core.errors import UserError
from edt_core.printing.redaction import redacted
from edt_core.progress import Progress
from edt_core.store.errors import clear_remote_errors
from edt_core.store.folder import Folder

IMAGES = "files with an extension that the installed Pillow decodes, such as .jpg, .png, .webp or .avif"
THREADS = 8
_LONG_S = 0.05  # less says nothing of a disk
SHOWN = 10  # names that a message lists
# Folders that systems create: macOS's archiver, Synology's thumbnails, Windows, ext4.
_OF_THE_SYSTEM = {b"__MACOSX", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found"}
STAT = ("mtime_ns", "ctime_ns", "inode", "device")  # what the disk says of a file beside its size, modulo 2**64
_NOT_THERE = (0, 0, 0, 0)
_MASK = (1 << 64) - 1
CREDENTIALS = re.compile(r"://[^/@\s:]*:(?!\d+/)\S*@")  # user:password@, but not a port or an Azure container
_TOKENS = ("ETag", "etag", "checksum", "md5Hash", "content_md5")  # s3fs, gcsfs and adlfs, fsspec's own, gcsfs, adlfs
Result = TypeVar("Result")


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


class Entry(NamedTuple):
    """One file or folder. `version` is the store's own token for the content of a remote file, `stat` that of a disk.

    `version` is empty for a local file; `stat` has the values of STAT, zeros for a remote file or one that is gone.
    """

    name: bytes
    is_folder: bool
    size: int
    version: str
    stat: tuple[int, int, int, int] = _NOT_THERE


@dataclass(frozen=True)
class Files:
    """Table of name (binary), size (int64) and, if remote, version (string), else STAT (uint64), sorted by name.

    `others` counts the files that were not selected, by extension, for each folder that contains some; a folder
    directly in the source is listed even without such files. The name of the source itself is empty.
    """

    table: pa.Table
    others: dict[bytes, Counter[str]]

    @property
    def left_out(self) -> Counter[str]:
        """Files that were not selected, by extension."""
        return sum(self.others.values(), Counter())

    @property
    def names(self) -> list[bytes]:
        return list(self.table["name"].to_pylist())


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


def entries(root: Folder, folder: bytes = b"") -> list[Entry]:
    """The files and folders directly in a folder of the source, sorted by name, without dotfiles.

    Names are relative to `root`. Raises UserError for a folder that cannot be read: its images would be lost silently.
    """
    if (path := root.local) is not None:
        return sorted(_disk_entries(os.fsencode(path), folder))
    fs, base = remote(root)
    with read_errors(root.uri):
        infos = fs.ls(remote_path(base, folder).rstrip("/"), detail=True)
    return sorted(_remote_entries(fs, base, infos))


def _hidden(name: bytes) -> bool:
    return name.startswith(b".") or name in _OF_THE_SYSTEM


def _disk_entries(root: bytes, folder: bytes) -> Iterator[Entry]:
    try:
        with os.scandir(os.path.join(root, folder)) as items:
            for item in items:
                if _hidden(item.name):
                    continue
                name = folder + b"/" + item.name if folder else item.name
                if _is_folder(root, name, item):
                    yield Entry(name, True, 0, "")
                    continue
                try:
                    status = item.stat()
                except OSError:  # a broken link, or removed since: reading it reports the error
                    yield Entry(name, False, 0, "")
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield Entry(name, False, status.st_size, "", stat_of(status))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(_loop(root, folder, "leads back to itself")) from error
        where = as_text(os.path.join(root, folder))
        remedy = "correct its permissions" if isinstance(error, PermissionError) else "check the address and the disk"
        raise UserError(f"cannot read the folder {where}: {error.strerror}; {remedy}") from error


def stat_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """The values of STAT."""
    return status.st_mtime_ns & _MASK, status.st_ctime_ns & _MASK, status.st_ino & _MASK, status.st_dev & _MASK


def _is_folder(root: bytes, name: bytes, item: "os.DirEntry[bytes]") -> bool:
    """Whether it is a folder, or a link to one. Raises UserError for a link that makes the walk endless."""
    try:
        is_folder = item.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(_loop(root, name, "leads back to itself")) from error
        raise
    if is_folder and item.is_symlink():
        _check_no_loop(root, name)
    return is_folder


def _check_no_loop(root: bytes, name: bytes) -> None:
    """Raise UserError for a link to a folder that contains the link: the walk would never end."""
    target, folder = _identity(os.path.join(root, name)), name
    while folder:
        folder = os.path.dirname(folder)
        above = os.path.join(root, folder)
        if _identity(above) == target:
            raise UserError(_loop(root, name, f"leads to {as_text(above.rstrip(b'/'))}, which contains it"))


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _loop(root: bytes, name: bytes, what: str) -> str:
    """The message for a loop of symbolic links; `name` is the link that closes it."""
    path = os.path.join(root, name).rstrip(b"/")
    to = f" -> {as_text(os.readlink(path))}" if os.path.islink(path) else ""
    return f"a loop of symbolic links in the source: {as_text(path)}{to} {what}; remove the link, or change its target"


def _remote_entries(fs: Any, base: str, infos: Sequence[dict[str, Any]]) -> Iterator[Entry]:
    for info in infos:
        path = str(info["name"]).rstrip("/")
        encoded = path.removeprefix(base).lstrip("/").encode("utf-8", "surrogateescape")
        if not path.startswith(f"{base}/") or any(map(_hidden, encoded.split(b"/"))):
            continue  # the folder's own marker, and dotfiles
        is_folder = info["type"] == "directory"
        if is_folder or not str(info["name"]).endswith("/"):
            version = "" if is_folder else _version(fs, info)
            yield Entry(encoded, is_folder, int(info.get("size") or 0), version)


def _version(fs: Any, info: dict[str, Any]) -> str:
    token = next((info[key] for key in _TOKENS if info.get(key)), None)
    return str(token if token is not None else fs.checksum(info["name"])).strip('"')


def _walk(root: Folder, folder: bytes) -> Iterator[Entry]:
    """Every file at any depth below a folder of the source."""
    if (path := root.local) is not None:
        pending = [folder]
        while pending:
            for entry in _disk_entries(os.fsencode(path), pending.pop()):
                if entry.is_folder:
                    pending.append(entry.name)
                else:
                    yield entry
        return
    fs, base = remote(root)
    with read_errors(root.uri):
        infos = fs.find(remote_path(base, folder), detail=True)
    yield from (entry for entry in _remote_entries(fs, base, list(infos.values())) if not entry.is_folder)


def files_below(root: Folder, keep: Callable[[bytes], bool], progress: Progress, *, recursive: bool = True) -> Files:
    """The files at any depth whose relative name `keep` accepts. Slow sub-folders are listed in parallel."""
    top = entries(root)
    folders = [entry.name for entry in top if entry.is_folder] if recursive else []

    def part(folder: bytes, files: Iterator[Entry]) -> tuple[pa.Table, dict[bytes, Counter[str]]]:
        selection, others = [], {folder: Counter[str]()}
        for entry in files:
            if keep(entry.name):
                selection.append(entry)
            else:
                others.setdefault(entry.name.rpartition(b"/")[0], Counter())[extension(entry.name)] += 1
        return _table(selection, with_version=root.local is None), others

    def listed(folder: bytes) -> tuple[pa.Table, dict[bytes, Counter[str]]]:
        return part(folder, _walk(root, folder))

    parts = [part(b"", (entry for entry in top if not entry.is_folder))]
    results = _in_threads(listed, folders) if root.local is None else in_threads_if_slow(listed, folders)
    for done, result in enumerate(results, 1):
        parts.append(result)
        progress.update(done, len(folders), "folders listed")
    table = pa.concat_tables([table for table, _ in parts]).sort_by("name")
    return Files(table, {folder: counts for _, others in parts for folder, counts in others.items()})


def _in_threads(work: Callable[[bytes], Result], folders: Sequence[bytes]) -> Iterator[Result]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(work, folders)


def in_threads_if_slow(work: Callable[[bytes], Result], folders: Sequence[bytes]) -> Iterator[Result]:
    """One folder after another as long as the disk answers at once; if it lets one wait, the others in threads.

    A network disk answers slowly. With a fast one the threads would wait for each other: eight of them took three times
    as long as one. The order is that of the folders.
    """
    elapsed = worked = 0.0
    for done, folder in enumerate(folders, 1):
        began, before = time.perf_counter(), time.thread_time()
        result = work(folder)
        elapsed += time.perf_counter() - began
        worked += time.thread_time() - before
        yield result
        if elapsed > _LONG_S and worked < elapsed / 2:
            yield from _in_threads(work, folders[done:])
            return


def one_file(root: Folder, name: bytes) -> Files:
    """An existing file as `Files`."""
    with read_errors(f"{root.uri}/{as_text(name)}"):
        if (path := root.local) is not None:
            status = os.stat(os.path.join(os.fsencode(path), name))
            files = [Entry(name, False, status.st_size, "", stat_of(status))]
        else:
            fs, base = remote(root)
            files = list(_remote_entries(fs, base, [fs.info(remote_path(base, name))]))
    return Files(_table(files, with_version=root.local is None), {})


def _table(files: Sequence[Entry], with_version: bool) -> pa.Table:
    columns = {
        "name": pa.array([entry.name for entry in files], pa.binary()),
        "size": pa.array([entry.size for entry in files], pa.int64()),
    }
    if with_version:
        return pa.table({**columns, "version": pa.array([entry.version for entry in files], pa.string())})
    stats = np.array([entry.stat for entry in files], np.uint64).reshape(-1, len(STAT))
    return pa.table({**columns, **{name: pa.array(stats[:, k]) for k, name in enumerate(STAT)}})


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
