"""Compares files with their manifest: names and sizes from one listing, digests by reading the files.

A stamp records which files this node has verified, so that a training of many ranks digests its shards only once. For
each file it contains size, times of modification and change, inode and device. A file is read again when any of them
differs. Times are compared only with earlier times on the same node, and only decide whether to read a file again.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock

from edt_core.files.small_files import read_json
from edt_core.printing.console import on_one_line
from edt_core.progress import Progress
from edt_core.store.cache import cache_folder
from edt_core.store.folder import Folder, in_threads, is_hidden
from edt_core.store.manifest import FileEntry, ManifestError

_RUN_AGAIN = "rerun its step, or remove the files that are not in its manifest"
_SHOWN = 10
_ASKED = 100  # files that are looked for by name, one after the other
_MIB = 1 << 20
Stat = list[int]  # size, mtime_ns, ctime_ns, inode, device
# A file modified less than this before its digest may change again within the same tick of the file system's clock (2 s
# on the coarsest file systems) and look the same: such a file is not stamped.
_SETTLED_NS = 2_000_000_000


def damaged(folder: Folder, problems: Sequence[str], remedy: str = _RUN_AGAIN) -> ManifestError:
    """The error for an artifact that differs from its manifest: the first problems and their number."""
    number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ManifestError(f"{folder.uri} is damaged, {number}: {listing(problems)}; {remedy}")


def listing(problems: Sequence[str], separator: str = "; ") -> str:
    """The first ten problems and the number of the others."""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return separator.join([*map(on_one_line, problems[:_SHOWN]), *more])


def difference(entry: FileEntry, sha256: str | None) -> str:
    """The problem of a file with this actual sha256; None for a file that is missing."""
    if sha256 is None:
        return f"{entry.path} is missing"
    return f"{entry.path} has {entry.bytes} bytes as in its manifest, but another sha256"


def compare_sizes(
    data: Folder, entries: Sequence[FileEntry], sizes: Mapping[str, int]
) -> tuple[list[str], list[FileEntry]]:
    """Problems of a folder whose listing is `sizes`, and the files that exist with the right size.

    A file is extra if it is in the folder, at any depth, and not in `entries`; names that start with a dot (journal,
    staging, locks) are ignored. The first files that a listing lacks are looked for by their
    names: some stores list late.
    """
    problems, complete, asked = [], [], 0
    for entry in entries:
        size = sizes.get(entry.path)
        if size is None and (asked < _ASKED or is_hidden(entry.path)):
            asked += not is_hidden(entry.path)
            size = data.size(entry.path)
        if size == entry.bytes:
            complete.append(entry)
        elif size is None:
            problems.append(f"{entry.path} is missing")
        else:
            problems.append(f"{entry.path} has {size} bytes, its manifest says {entry.bytes}")
    extra = sorted(set(sizes) - {entry.path for entry in entries})
    return problems + [f"{name} is not in the manifest" for name in extra], complete


def compare_digests(data: Folder, entries: Sequence[FileEntry], progress: Progress) -> dict[FileEntry, str | None]:
    """The files whose sha256 differs from their entry, with their actual sha256; None for a missing file."""

    def digest(entry: FileEntry) -> str | None:
        try:
            return data.digest(entry.path)
        except FileNotFoundError:
            return None

    total, done = sum(entry.bytes for entry in entries), 0
    differing = {}
    for entry, sha256 in in_threads(digest, entries):
        done += entry.bytes
        progress.update(-(-done // _MIB), -(-total // _MIB), "MiB digested")
        if sha256 != entry.sha256:
            differing[entry] = sha256
    return dict(sorted(differing.items(), key=lambda pair: pair[0].path))


def digest_once(
    data: Folder, entries: Sequence[FileEntry], digest: str, progress: Progress
) -> dict[FileEntry, str | None]:
    """`compare_digests` of a local folder, without the files that this node has verified and that are unchanged since.

    `digest` is the content digest of their manifest. Of several processes on a node, one reads and the others wait.
    """
    assert data.local is not None
    stamp = Stamp(data.local, digest)
    with stamp.lock():
        start_ns = time.time_ns()
        stats, verified = stamp.stats(entry.path for entry in entries), stamp.verified()
        unread = [e for e in entries if e.path not in stats or verified.get(e.path) != stats[e.path]]
        differing = compare_digests(data, unread, progress)
        if valid := {e.path: stats[e.path] for e in unread if e.path in stats and e not in differing}:
            stamp.add(valid, start_ns)
    return differing


class Stamp:
    """The verified files below one folder. Hold `lock` from `verified` to `add`, so that other processes wait."""

    def __init__(self, root: Path, digest: str) -> None:
        key = hashlib.sha256(f"{root}\n{digest}".encode()).hexdigest()[:32]
        self.root, self.path = root, cache_folder() / "verified" / f"{key}.json"
        self.writable = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.writable = os.access(self.path.parent, os.W_OK)
        except OSError:
            self.writable = False

    def lock(self) -> AbstractContextManager[object]:
        return FileLock(self.path.with_suffix(".lock")) if self.writable else nullcontext()

    def stats(self, names: Iterable[str]) -> dict[str, Stat]:
        """The current stats of the files, without those that are missing."""
        stats: dict[str, Stat] = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                status = (self.root / name).stat()
                stats[name] = [
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                    status.st_ino,
                    status.st_dev,
                ]
        return stats

    def verified(self) -> dict[str, Stat]:
        """The stats in the stamp; empty if it is missing or damaged."""
        try:
            stats = read_json(self.path)
            return stats if isinstance(stats, dict) else {}
        except (OSError, ValueError):
            return {}

    def add(self, before: dict[str, Stat], start_ns: int) -> None:
        """Stamp verified files, with their stats from before their digest began at `start_ns`."""
        if not self.writable:
            return
        now = self.stats(before)
        settled = {
            name: stat
            for name, stat in before.items()
            if now.get(name) == stat and min(stat[1], stat[2]) < start_ns - _SETTLED_NS
        }
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}-{time.time_ns()}")
        with suppress(OSError):  # without a stamp the files are only digested again
            staged.write_text(json.dumps({**self.verified(), **settled}), encoding="utf-8")
            staged.replace(self.path)
