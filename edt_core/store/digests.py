"""Whether files are what their manifest says: names and sizes by one listing, digests by reading them.

A stamp keeps what this node has digested and found right, so that a training of many ranks digests its shards once. It
holds what the file system says of each file: size, times of modification and change, inode, device. While all of them
stay, the file is not read again; when any differs it is. Times only ever decide whether to look again: they are
compared with themselves on one node, and never say that bytes are right.
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

_RUN_AGAIN = "run its step again, or remove what is not in its manifest"
_SHOWN = 10
_MIB = 1 << 20
Stat = list[int]  # size, mtime_ns, ctime_ns, inode, device
# A file that was written to less than this before it was digested may be written to again within the same tick of its
# clock (2 s on the coarsest file systems) and look the same: such a file is not stamped.
_SETTLED_NS = 2_000_000_000


def damaged(folder: Folder, problems: Sequence[str], remedy: str = _RUN_AGAIN) -> ManifestError:
    """The error for an artifact that differs from its manifest: the first problems, and how many there are."""
    number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ManifestError(f"{folder.uri} is damaged, {number}: {listing(problems)}; {remedy}")


def listing(problems: Sequence[str], separator: str = "; ") -> str:
    """The first ten problems and the number of the others."""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return separator.join([*map(on_one_line, problems[:_SHOWN]), *more])


def difference(entry: FileEntry, sha256: str | None) -> str:
    """How a file differs whose sha256 is this; None for a file that is not there."""
    if sha256 is None:
        return f"{entry.path} is missing"
    return f"{entry.path} has {entry.bytes} bytes as stated but another sha256"


def compare_sizes(
    data: Folder, entries: Sequence[FileEntry], sizes: Mapping[str, int]
) -> tuple[list[str], list[FileEntry]]:
    """Problems of a folder whose listing is `sizes`, and the files that are there with the bytes stated.

    A file is extra if it lies in the folder, at any depth, and `entries` do not list it; names that start with a dot
    (journal, staging, locks) are not looked at.
    """
    found, whole = [], []
    for entry in entries:
        size = data.size(entry.path) if is_hidden(entry.path) else sizes.get(entry.path)
        if size == entry.bytes:
            whole.append(entry)
        elif size is None:
            found.append(f"{entry.path} is missing")
        else:
            found.append(f"{entry.path} has {size} bytes, its manifest says {entry.bytes}")
    extra = sorted(set(sizes) - {entry.path for entry in entries})
    return found + [f"{name} is not in the manifest" for name in extra], whole


def compare_digests(data: Folder, entries: Sequence[FileEntry], progress: Progress) -> dict[FileEntry, str | None]:
    """Files whose sha256 is not the one stated, with the one they have; None for a file that is not there."""

    def digest(entry: FileEntry) -> str | None:
        try:
            return data.digest(entry.path)
        except FileNotFoundError:
            return None

    total, done = sum(entry.bytes for entry in entries), 0
    found = {}
    for entry, sha256 in in_threads(digest, entries):
        done += entry.bytes
        progress.update(-(-done // _MIB), -(-total // _MIB), "MiB digested")
        if sha256 != entry.sha256:
            found[entry] = sha256
    return dict(sorted(found.items(), key=lambda pair: pair[0].path))


def digest_once(
    data: Folder, entries: Sequence[FileEntry], digest: str, progress: Progress
) -> dict[FileEntry, str | None]:
    """`compare_digests` of a local folder, without the files that this node found right and that are untouched since.

    `digest` is the content digest of their manifest. Of several processes on a node one reads, the others wait.
    """
    assert data.local is not None
    stamp = Stamp(data.local, digest)
    with stamp.lock():
        began_ns = time.time_ns()
        stats, stamped = stamp.stats(entry.path for entry in entries), stamp.verified()
        unread = [e for e in entries if e.path not in stats or stamped.get(e.path) != stats[e.path]]
        differing = compare_digests(data, unread, progress)
        if right := {e.path: stats[e.path] for e in unread if e.path in stats and e not in differing}:
            stamp.add(right, began_ns)
    return differing


class Stamp:
    """What is verified below one folder. Hold `lock` from `verified` to `add`: other processes then wait for it."""

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
        """What the file system says now; a file that is not there is left out."""
        found: dict[str, Stat] = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                status = (self.root / name).stat()
                found[name] = [
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                    status.st_ino,
                    status.st_dev,
                ]
        return found

    def verified(self) -> dict[str, Stat]:
        """What was stamped; nothing where the stamp is not there or not whole."""
        try:
            stamped = read_json(self.path)
            return stamped if isinstance(stamped, dict) else {}
        except (OSError, ValueError):
            return {}

    def add(self, before: dict[str, Stat], began_ns: int) -> None:
        """Stamp files that were found right, with their stats from before they were digested at `began_ns`."""
        if not self.writable:
            return
        now = self.stats(before)
        settled = {
            name: stat
            for name, stat in before.items()
            if now.get(name) == stat and min(stat[1], stat[2]) < began_ns - _SETTLED_NS
        }
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}-{time.time_ns()}")
        with suppress(OSError):  # without a stamp the files are digested again, and that is all
            staged.write_text(json.dumps({**self.verified(), **settled}), encoding="utf-8")
            staged.replace(self.path)
