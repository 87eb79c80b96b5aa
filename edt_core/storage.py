"""A folder by URI: local path, `s3://`, `gs://`, or whatever else fsspec opens. Picklable, so Ray tasks can take it."""

import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edt_core.errors import UserError

_CHUNK = 8 << 20


def sha256_file(path: Path) -> str:
    """Hex sha256 of a local file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_file(path: Path) -> None:
    """Ask the disk for the bytes of `path` and then for its name in the folder."""
    for target in (path, path.parent):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _clear_disk_errors(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space is left on the device; free some and run again",
            errno.EDQUOT: "the disk quota is used up; free some and run again",
            errno.EACCES: "permission denied; choose a folder you may write to",
            errno.EPERM: "operation not permitted; choose a folder you may write to",
            errno.EROFS: "the file system is read-only; choose another",
            errno.ENOTDIR: "a part of this path is a file; choose another",
            errno.EEXIST: "a part of this path is a file; choose another",
        }
        if error.errno not in reasons:
            raise
        raise UserError(f"cannot write to {where}: {reasons[error.errno]}") from error


@dataclass(frozen=True)
class Folder:
    """A folder at `uri`. Names are relative paths with `/`."""

    uri: str

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> "Folder":
        """Folder at a URI or a local path; a local path is made absolute, because workers start elsewhere."""
        text = os.fspath(location)
        return cls(text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute()))

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None where it is remote."""
        if self.uri.startswith("file://"):
            return Path(self.uri.removeprefix("file://"))
        return None if "://" in self.uri else Path(self.uri)

    def _remote(self) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.uri, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"cannot open {self.uri}: {error}; install the extra for it, as edt-pipeline[s3] or [gcs]"
            ) from error

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    def child(self, name: str) -> "Folder":
        return Folder(f"{self.uri}/{name}") if name else self

    def exists(self, name: str) -> bool:
        if (root := self.local) is not None:
            return (root / name).exists()
        fs, path = self._remote()
        return bool(fs.exists(f"{path}/{name}"))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        try:
            if (root := self.local) is not None:
                return (root / name).stat().st_size
            fs, path = self._remote()
            return int(fs.size(f"{path}/{name}"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self) -> list[str]:
        """Names directly inside, sorted; empty where the folder does not exist."""
        if (root := self.local) is not None:
            return sorted(p.name for p in root.iterdir()) if root.is_dir() else []
        fs, path = self._remote()
        try:
            return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def read_bytes(self, name: str) -> bytes:
        if (root := self.local) is not None:
            return (root / name).read_bytes()
        fs, path = self._remote()
        return bytes(fs.cat_file(f"{path}/{name}"))

    def write_bytes(self, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        """Write a whole file or nothing; its name appears last.

        With `exclusive`, an existing file stays as it is and False is returned (on local file systems this holds
        between processes as well; on an object store the last writer wins).
        """
        with _clear_disk_errors(self.uri):
            root = self.local
            if root is None:
                fs, path = self._remote()
                if exclusive and fs.exists(f"{path}/{name}"):
                    return False
                fs.pipe_file(f"{path}/{name}", data)
                return True
            with self.staged(name) as staged:
                staged.write_bytes(data)
                return self._publish(staged, root / name, exclusive)

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A local path to write to, on the file system of the folder if it is local; gone afterwards."""
        root = self.local
        with _clear_disk_errors(self.uri):
            if root is None:
                staging = Path(tempfile.mkdtemp(prefix="edt-"))
            else:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                staging = (root / name).parent / f".staging-{uuid.uuid4().hex}"
                staging.mkdir()
        try:
            with _clear_disk_errors(self.uri):
                yield staging / Path(name).name
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def publish(self, staged: Path, name: str) -> None:
        """Move a staged file to its name, after its bytes are on the disk."""
        with _clear_disk_errors(self.uri):
            if (root := self.local) is not None:
                self._publish(staged, root / name, exclusive=False)
            else:
                fs, path = self._remote()
                fs.put_file(str(staged), f"{path}/{name}")

    @staticmethod
    def _publish(staged: Path, target: Path, exclusive: bool) -> bool:
        fsync_file(staged)
        if not exclusive:
            staged.replace(target)
        else:
            try:
                os.link(staged, target)
            except FileExistsError:
                return False
            except OSError:  # no hard links here (SMB, exFAT): look and then rename, exclusive but for a moment
                if target.exists():
                    return False
                staged.replace(target)
        fsync_file(target)
        return True

    def local_copy(self, name: str) -> Path:
        """The file as a local path: itself, or a cached download.

        Raises FileNotFoundError where there is none.
        """
        if (root := self.local) is not None:
            if not (root / name).exists():
                raise FileNotFoundError(root / name)
            return root / name
        fs, path = self._remote()
        cache = Path(os.environ.get("EDT_CACHE_DIR", "~/.cache/edt")).expanduser()
        target = cache / hashlib.sha256(self.uri.encode()).hexdigest()[:16] / name
        if not target.exists() or target.stat().st_size != fs.size(f"{path}/{name}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
            fs.get_file(f"{path}/{name}", str(partial))
            partial.replace(target)
        return target

    def local_directory(self) -> Path:
        """The folder's files as a local folder: itself, or cached downloads."""
        if (root := self.local) is not None:
            return root
        copies = [self.local_copy(name) for name in self.names()]
        return copies[0].parent

    def remove(self, name: str) -> None:
        """Remove a file or a folder if it is there."""
        if (root := self.local) is not None:
            target = root / name
            if target.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)
            return
        fs, path = self._remote()
        with suppress(FileNotFoundError):
            fs.rm(f"{path}/{name}", recursive=True)

    def check_writable(self) -> None:
        """Raise UserError unless a file can be written here."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"")
        except UserError:
            raise
        except Exception as error:  # object stores have exceptions of their own for missing buckets and credentials
            raise UserError(f"cannot write to {self.uri}: {error}; choose another folder or mend the access") from error
        self.remove(probe)
