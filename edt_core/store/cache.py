"""This node's cache of remote files: bounded, shared by its processes, and verified as it is filled.

    <EDT_CACHE_DIR, or ~/.cache/edt>/
        objects/<ab>/<sha256>     a file of any artifact, by its digest, which is checked during the download
        views/<digest>/<name>     one artifact's names, as symbolic links to objects
        files/<uri>/<name>        files without a known digest (checkpoints of a running training), by URI and version
        verified/                 the stamps of `Artifact.verify_once` on this node
        locks/                    one writer per file; the operating system releases a lock when its process ends
    room.json                 the bytes that are there or arriving: see `edt_core.store.room`

A cached file is read-only and gets its name when it is complete, so a killed download leaves only a `.part`; the next
call that looks at all files, or needs that one, removes it. EDT_CACHE_BYTES limits the size of the cache (default: half
of the file system): before a download, the least recently used files are removed, except those that a call in progress
needs. The same happens below the limit if other files leave too little space on the disk. A file that another process
has open or memory-mapped is unlinked, which POSIX allows: that process can still read it, and the space is freed when
it closes the file. Calls that download different files at the same time keep the limit together: one waits for the
other.
"""

import glob
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from edt_core.errors import UserError
from edt_core.progress import Progress, Silent
from edt_core.store.errors import clear_disk_errors
from edt_core.store.folder import Folder, fsync_file, in_threads
from edt_core.store.manifest import FileEntry, ManifestError
from edt_core.store.room import SEALED_NS, Room

DIRECTORY_VARIABLE, BYTES_VARIABLE = "EDT_CACHE_DIR", "EDT_CACHE_BYTES"
_ROUNDS = 3  # attempts: another program may remove files during a download
_MIB = 1 << 20
_UNITS = {unit: factor for k, u in enumerate("KMGTP", 1) for unit, factor in ((u, 1000**k), (f"{u}I", 1024**k))}


def cache_folder() -> Path:
    """Where this node's cache is: EDT_CACHE_DIR, or ~/.cache/edt."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or "~/.cache/edt").expanduser().absolute()


def parse_bytes(text: str) -> int:
    """A positive number of bytes, plain or with a unit: 200GB is decimal, 1TiB binary. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGTP]I?)?B?)\s*", text.upper())
    value = int(float(match[1]) * _UNITS.get(match[2] or "", 1)) if match else 0
    if value <= 0:
        raise UserError(f"{BYTES_VARIABLE} is {text!r}; give a number of bytes, such as 200GB, 1TiB or 50000000000")
    return value


def local_copy(folder: Folder, name: str) -> Path:
    """A file as a local path: itself, or a copy in this node's cache, downloaded again if the file has changed.

    Its digest is unknown and not checked. Raises FileNotFoundError if the file does not exist.
    """
    if (root := folder.local) is not None:
        if not (root / name).exists():
            raise FileNotFoundError(root / name)
        return root / name
    return Cache.of_node().copy(folder, [name]) / name


def local_directory(folder: Folder) -> Path:
    """A folder's files as a local folder: itself, or copies in this node's cache."""
    return folder.local or Cache.of_node().copy(folder, list(folder.walk()))


@dataclass(frozen=True)
class Cache:
    """The cache below `root`, of at most `bound` bytes."""

    root: Path
    bound: int

    @classmethod
    def of_node(cls) -> "Cache":
        """This node's cache, configured by the environment. Raises UserError if it is not writable."""
        root = cache_folder()
        with clear_disk_errors(f"the cache {root} (set {DIRECTORY_VARIABLE})"):
            root.mkdir(parents=True, exist_ok=True)
        limit = os.environ.get(BYTES_VARIABLE)
        return cls(root, parse_bytes(limit) if limit else shutil.disk_usage(root).total // 2)

    def view(self, folder: Folder, entries: Sequence[FileEntry], key: str, progress: Progress | None = None) -> Path:
        """A local folder with `entries` of a remote `folder` under their names; `key` is their artifact's digest.

        Files not in the cache are downloaded in parallel. Raises ManifestError if a file is missing or has another
        digest (it is then not kept), UserError if `entries` are larger than the limit or the disk is full.
        """
        root = self.root / "views" / key
        targets = {self._object(entry.sha256): entry for entry in entries}
        sizes = {target: entry.bytes for target, entry in targets.items()}
        self._fill(folder, sizes, lambda target: self._download(folder, targets[target], target), progress)
        with clear_disk_errors(f"the cache {self.root}"):
            for entry in entries:
                link = root / entry.path
                if not link.is_symlink():
                    link.parent.mkdir(parents=True, exist_ok=True)
                    _link(os.path.relpath(self._object(entry.sha256), link.parent), link)
        return root

    def copy(self, folder: Folder, names: Sequence[str]) -> Path:
        """A local folder with copies of the current versions of these remote files, whose digests are unknown.

        Raises FileNotFoundError if one does not exist, UserError as `view`.
        """
        root = self.root / "files" / hashlib.sha256(folder.uri.encode()).hexdigest()[:16]
        fs, path = folder.filesystem()
        sizes, versions = {}, {}
        for name in names:
            size = folder.size(name)
            if size is None:
                raise FileNotFoundError(f"{folder.uri}/{name}")
            sizes[root / name] = size
            # The store's version token (ETag, generation, time) is part of a hidden file's name.
            version = fs.ukey(f"{path}/{name}")
            versions[root / name] = (root / name).with_name(f".{Path(name).name}.{version[:16]}")
        for target, version in versions.items():
            if not version.exists():
                target.unlink(missing_ok=True)

        def download(target: Path) -> None:
            name = target.relative_to(root).as_posix()
            with self._lock(target):
                if not _use(target, sizes[target]):
                    for old in target.parent.glob(f".{glob.escape(target.name)}.*"):
                        old.unlink(missing_ok=True)
                    self._receive(target, lambda part: folder.fetch(name, part))
                    versions[target].touch()

        self._fill(folder, sizes, download, None)
        root.mkdir(parents=True, exist_ok=True)
        return root

    def _object(self, sha256: str) -> Path:
        return self.root / "objects" / sha256[:2] / sha256

    def _fill(
        self, folder: Folder, sizes: Mapping[Path, int], download: Callable[[Path], None], progress: Progress | None
    ) -> None:
        """Make sure that every file of `sizes` (path -> bytes) is in the cache; `download` fetches one."""
        progress = progress or Silent()
        total = sum(sizes.values())
        if total > self.bound:
            raise UserError(
                f"{len(sizes)} files of {folder.uri} have {total:,} bytes, but the cache {self.root} on "
                f"{socket.gethostname()} keeps at most {self.bound:,}; raise {BYTES_VARIABLE} (with a large "
                f"enough disk in {DIRECTORY_VARIABLE}), or train with train.reader=stream, which keeps a few at a time"
            )
        for _ in range(_ROUNDS):
            missing = [path for path, size in sizes.items() if not _use(path, size)]
            if not missing:
                return
            done = total - sum(sizes[path] for path in missing)
            with Room(self.root, self.bound, self._lock).kept(sizes):
                for path, _nothing in in_threads(download, missing):
                    done += sizes[path]
                    progress.update(-(-done // _MIB), -(-total // _MIB), "MiB downloaded")
                if all(_use(path, size) for path, size in sizes.items()):
                    return
        raise UserError(
            f"files of {folder.uri} were removed from the cache {self.root} on {socket.gethostname()} while they "
            f"arrived, {_ROUNDS} times: something other than edt cleans it; set {DIRECTORY_VARIABLE} to another folder"
        )

    def _download(self, folder: Folder, entry: FileEntry, target: Path) -> None:
        """Download a missing object, unless another process did so while this one waited for the lock."""

        def receive(part: Path) -> None:
            try:
                digest = folder.fetch(entry.path, part)
            except FileNotFoundError as error:
                raise ManifestError(f"{folder.uri}/{entry.path} is missing; rerun its step") from error
            if digest != entry.sha256:
                raise ManifestError(
                    f"{folder.uri}/{entry.path} is damaged: it has {part.stat().st_size} bytes of sha256 "
                    f"{digest[:12]}, but its manifest says {entry.bytes} of {entry.sha256[:12]}; remove its artifact's "
                    "manifest.json and rerun its step"
                )

        with self._lock(target):
            if not _use(target, entry.bytes):
                self._receive(target, receive)

    def _receive(self, target: Path, receive: Callable[[Path], object]) -> None:
        """Write a file with `receive(part)` and rename it to `target` when complete. The caller holds its lock."""
        remedy = f"set {DIRECTORY_VARIABLE}, or lower {BYTES_VARIABLE}"
        with clear_disk_errors(f"the cache {self.root} on {socket.gethostname()} ({remedy})"):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            part.unlink(missing_ok=True)  # of a download that was killed
            try:
                receive(part)
                part.chmod(0o444)
                os.utime(part, ns=(time.time_ns(), SEALED_NS))
                fsync_file(part)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)

    def _lock(self, target: Path) -> FileLock:
        """The lock of a file. There are at most 4096, so they need no cleanup, which would be a race."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(target.relative_to(self.root).as_posix().encode()).hexdigest()[:3]
        return FileLock(folder / f"{name}.lock")


def _use(path: Path, size: int) -> bool:
    """Whether a cached file exists unchanged; if so, mark it as the most recently used.

    The access time is the time of use. The modification time shows that the file was not written to since.
    """
    try:
        status = path.stat()
        if status.st_size != size or status.st_mtime_ns != SEALED_NS:
            return False
        with suppress(PermissionError):  # another user's file in a shared cache
            os.utime(path, ns=(time.time_ns(), SEALED_NS))
    except FileNotFoundError:
        return False
    return True


def _link(target: str, link: Path) -> None:
    with suppress(FileExistsError):  # another process made the same link
        link.symlink_to(target)
