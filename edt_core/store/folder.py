"""A folder by URI: local path, `s3://`, `gs://`, or any other that fsspec opens. Picklable, so Ray tasks can take it.

The store's client reads credentials and endpoints from the environment (for S3: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3); a Folder does not contain them. The file
system is looked up at each use, so a Folder survives pickling and forks.
"""

import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edt_core.errors import UserError
from edt_core.files.place_names import check_store_name, is_local, typed_path
from edt_core.files.small_files import MAX_RECORD_BYTES, read_bounded, within
from edt_core.network.answers import check_s3
from edt_core.printing.redaction import redacted
from edt_core.store.errors import (
    clear_disk_errors,
    clear_read_errors,
    clear_remote_errors,
    clear_space_errors,
    error_code,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

_STAGING = ".staging-"
_STAGED = re.compile(rf"{re.escape(_STAGING)}[0-9a-f]{{32}}")
_CHUNK = 8 << 20
_THREADS = 8  # files processed in parallel: hashing and waiting both release the interpreter lock
_NO_CONDITIONAL_WRITE = {"NotImplemented", "501", "MethodNotAllowed"}
_CONFLICTS = 50


def sha256_file(path: Path) -> str:
    """Hex sha256 of a local file's bytes."""
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(source: Any, target: Any = None) -> str:
    """Hex sha256 of an open file's bytes; also copy them to `target` if one is given."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest()


def fsync_file(path: Path) -> None:
    """Flush the bytes of `path` and then its folder entry to the disk."""
    for target in (path, path.parent):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield (item, `work(item)`) as they finish. The first error is raised, and items not yet started are cancelled."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Folder:
    """A folder at `uri`. Names are relative paths with `/`.

    Every method raises UserError for errors of the disk or the store: no space, no rights, no bucket, no credentials.
    """

    uri: str

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> "Folder":
        """Folder at a URI or a local path; a local path becomes absolute, because workers run in other folders."""
        text = os.fspath(location)
        return cls(str(typed_path(text).absolute()) if is_local(text) else text.rstrip("/"))

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None if it is remote."""
        if self.uri.startswith("file://"):
            return Path(self.uri.removeprefix("file://"))
        return None if "://" in self.uri else Path(self.uri)

    def filesystem(self) -> tuple[Any, str]:
        """The fsspec file system of a URI, and the folder's path on it. Raises UserError if S3 does not answer."""
        import fsspec

        if self.uri.startswith(("s3://", "s3a://")):
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint:
                check_s3(endpoint)
        try:
            return fsspec.core.url_to_fs(self.uri, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"cannot open {self.uri}: {error}; install the extra for it, such as edt-pipeline[s3] or [gcs]"
            ) from error

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    def child(self, name: str) -> "Folder":
        return Folder(f"{self.uri}/{name}") if name else self

    def exists(self, name: str) -> bool:
        with self._clear_errors():
            if (root := self.local) is not None:
                return (root / name).exists()
            fs, path = self.filesystem()
            return bool(fs.exists(f"{path}/{name}"))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if it does not exist."""
        with self._clear_errors():
            try:
                if (root := self.local) is not None:
                    return (root / name).stat().st_size
                fs, path = self.filesystem()
                return int(fs.size(f"{path}/{name}"))
            except (FileNotFoundError, NotADirectoryError) as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                return None

    def names(self) -> list[str]:
        """Names directly inside, sorted; empty if the folder does not exist."""
        with self._clear_errors():
            if (root := self.local) is not None:
                return sorted(p.name for p in root.iterdir()) if root.is_dir() else []
            fs, path = self.filesystem()
            try:
                return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                return []

    def walk(self) -> dict[str, int]:
        """Name -> bytes of every file below, from one listing, without names and folders that start with a dot."""
        with self._clear_errors():
            if (root := self.local) is not None:
                return dict(_walk_local(root, ""))
            fs, path = self.filesystem()
            try:
                infos = fs.find(path, detail=True)
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                return {}
            files = {key.removeprefix(f"{path}/"): info for key, info in infos.items()}
            return {
                name: int(info["size"])
                for name, info in files.items()
                # some clients represent an empty folder by a name that ends with a slash
                if info["type"] == "file" and name not in ("", path) and name[-1] != "/" and not is_hidden(name)
            }

    def read_bytes(self, name: str, limit: int = MAX_RECORD_BYTES) -> bytes:
        """A whole file of at most `limit` bytes.

        Raises FileNotFoundError if it does not exist, and UnusableFileError if it is larger or not a regular file.
        """
        with self._clear_errors():
            if (root := self.local) is not None:
                return read_bounded(root / name, limit)
            fs, path = self.filesystem()
            return within(_beginning(fs, f"{path}/{name}", limit + 1), f"{self.uri}/{name}", limit)

    def digest(self, name: str) -> str:
        """Hex sha256 of a file's bytes in the store: a remote file is streamed, never read from a cache.

        Raises FileNotFoundError if it does not exist.
        """
        with self._clear_errors(), self._open(name) as source:
            return _sha256(source)

    def fetch(self, name: str, target: Path) -> str:
        """Copy a file's bytes to a local path and return their sha256.

        Raises FileNotFoundError if it does not exist, and OSError if the disk of `target` is full.
        """
        with self._clear_errors(), self._open(name) as source, target.open("wb") as file:
            return _sha256(source, file)

    def write_bytes(self, name: str, data: bytes, *, exclusive: bool = False, private: bool = False) -> bool:
        """Write a file atomically. With `private`, only its owner can read a local file.

        With `exclusive`, an existing file is left unchanged and False is returned. That holds between processes on
        local file systems and on object stores with conditional writes (S3, GCS); on others the last writer wins.
        """
        root = self.local
        if root is not None:
            with clear_disk_errors(self.uri), self.staged(name) as staged:
                staged.touch(mode=0o600 if private else 0o666)
                staged.write_bytes(data)
                return _publish(staged, root / name, exclusive)
        with clear_remote_errors(self.uri):
            fs, path = self.filesystem()
            target = f"{path}/{name}"
            if not exclusive:
                fs.pipe_file(target, data)
                return True
            return not fs.exists(target) and _create(fs, target, data)

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A temporary local path to write to: on the folder's file system, or in TMPDIR if the folder is remote."""
        root = self.local
        where = self.uri if root is not None else f"the temporary folder {tempfile.gettempdir()} (set TMPDIR)"
        with clear_disk_errors(where):
            if root is None:
                staging = Path(tempfile.mkdtemp(prefix="edt-"))
            else:
                try:
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                except FileNotFoundError as error:  # such as below /proc
                    raise UserError(
                        f"cannot write to {where}: no folder can be created there; choose another"
                    ) from error
                staging = (root / name).parent / f"{_STAGING}{uuid.uuid4().hex}"
                staging.mkdir()
        try:
            with clear_space_errors(where):
                yield staging / Path(name).name
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def publish(self, staged: Path, name: str) -> None:
        """Rename a staged file to its name, after flushing it to the disk, or upload it."""
        if (root := self.local) is not None:
            with clear_disk_errors(self.uri):
                _publish(staged, root / name, exclusive=False)
        else:
            with clear_remote_errors(self.uri):
                fs, path = self.filesystem()
                fs.put_file(str(staged), f"{path}/{name}")

    def remove(self, name: str) -> None:
        """Remove a file or a folder if it exists; a link is removed, but not its target."""
        if (root := self.local) is not None:
            target = root / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)
            return
        with clear_remote_errors(self.uri), suppress(FileNotFoundError):
            fs, path = self.filesystem()
            fs.rm(f"{path}/{name}", recursive=True)

    def sweep(self) -> None:
        """Remove staged files of killed writers. Only for a folder that no process writes to any more."""
        if (root := self.local) is not None:
            for staging in root.rglob(f"{_STAGING}*"):
                if is_staged(staging.name):
                    shutil.rmtree(staging, ignore_errors=True)

    def check_writable(self) -> None:
        """Raise UserError unless a file can be written here, and the folder's path can be recorded."""
        if (root := self.local) is not None:
            check_store_name(root)
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"")
        except UserError:
            raise
        except Exception as error:  # object stores have their own exception classes
            raise UserError(
                f"cannot write to {self.uri}: {redacted(str(error))}; choose another folder or correct the access"
            ) from error
        self.remove(probe)

    def _open(self, name: str) -> Any:
        if (root := self.local) is not None:
            return (root / name).open("rb")
        fs, path = self.filesystem()
        return fs.open(f"{path}/{name}", "rb", block_size=_CHUNK, cache_type="none")

    def _clear_errors(self) -> AbstractContextManager[None]:
        return clear_read_errors(self.uri) if self.local is not None else clear_remote_errors(self.uri)


def is_staged(name: str) -> bool:
    """Whether a name is that of a folder of `Folder.staged`."""
    return _STAGED.fullmatch(name) is not None


def is_hidden(name: str) -> bool:
    """Whether a relative name or a folder of it starts with a dot: journals, staging, locks; never a published file."""
    return name.startswith(".") or "/." in name


def _walk_local(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk_local(Path(entry.path), f"{prefix}{entry.name}/")
        else:
            with suppress(FileNotFoundError):  # a broken link, or a file removed in the meantime
                yield prefix + entry.name, entry.stat().st_size


def _beginning(fs: Any, path: str, count: int) -> bytes:
    """The first `count` bytes of a remote file, or all of it."""
    try:
        return bytes(fs.cat_file(path, start=0, end=count))
    except FileNotFoundError:
        raise
    except Exception:  # stores reject a range of an empty file, each with another exception
        if fs.size(path) != 0:
            raise
        return b""


def _create(fs: Any, target: str, data: bytes) -> bool:
    """Write an object unless it exists, as one conditional write if the store supports that."""
    for _ in range(_CONFLICTS):
        try:
            fs.pipe_file(target, data, mode="create")
            return True
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError):  # a file system without conditional writes, or without `mode`
            break
        except OSError as error:
            if error_code(error) in _NO_CONDITIONAL_WRITE:
                break
            if error_code(error) != "ConditionalRequestConflict":
                raise
            time.sleep(0.1)  # another write of this name is in progress
            if fs.exists(target):
                return False
    fs.pipe_file(target, data)
    return True


def _publish(staged: Path, target: Path, exclusive: bool) -> bool:
    fsync_file(staged)
    if not exclusive:
        staged.replace(target)
    else:
        try:
            os.link(staged, target)
        except FileExistsError:
            return False
        except OSError:  # no hard links (SMB, exFAT): check and then rename, which is a short race
            if target.exists():
                return False
            staged.replace(target)
    fsync_file(target)
    return True
