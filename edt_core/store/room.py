"""The room in a node's cache: what is there, what is arriving, and what makes place for it.

Processes of a node share a ledger, `room.json` below the cache, under a lock: the bytes of all files that are there or
arriving, and the files of each call that is in progress. A call counts the files that it lacks before it fetches them,
so calls at the same time stay below the limit together, and nobody removes files of a call in progress. A call for
which there is no place waits for those.

The ledger saves a look at every file of the cache, which takes half a second for 10,000 of them. A process looks when
it knows no more files that it could remove, when a call was killed or failed, and every ten minutes. In between it
removes the least recently used ones that it saw then, unless they were used since.
"""

import json
import os
import re
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from edt_core.errors import UserError

# The modification time of every object, as in the Nix store: any later write changes it.
SEALED_NS = 1_000_000_000
_LEDGER, _CALLS = "room.json", "locks/calls"
_SHA256, _URI_KEY, _PART = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{16}"), re.compile(r"\.(.+)\.part")
_LOOK_EVERY_S = 600  # for files that other programs removed, or that earlier versions fetched without counting
_WAIT_S, _WAIT_AT_MOST_S = 0.2, 3600.0

_Seen = deque[tuple[int, int, Path]]  # time of the last use, bytes, file; the least recently used first
_seen: dict[Path, _Seen] = {}  # by cache, of this process


@dataclass
class _Ledger:
    """`used`: bytes of all files that are there or arriving. `calls`: of each call in progress, its files and bytes."""

    used: int
    looked: float
    calls: dict[str, dict[str, int]] = field(default_factory=dict)

    def arriving(self) -> dict[str, int]:
        return {name: size for files in self.calls.values() for name, size in files.items()}


@dataclass(frozen=True)
class Room:
    """The room of the cache below `root`, of `bound` bytes. `lock_of` gives the lock of a file of the cache."""

    root: Path
    bound: int
    lock_of: Callable[[Path], FileLock]

    @contextmanager
    def kept(self, sizes: Mapping[Path, int]) -> Iterator[None]:
        """Context in which there is room for these files (path -> bytes), and no call removes those that are there.

        Waits for the calls of other processes and threads. Raises UserError if they do not end within an hour.
        """
        token, files = uuid4().hex, {self._name(path): size for path, size in sizes.items()}
        alive = self._alive(token)
        alive.acquire()
        try:
            others = self._enter(token, files)
            deadline = time.monotonic() + _WAIT_AT_MOST_S
            while others and time.monotonic() < deadline:
                time.sleep(_WAIT_S)
                others = self._enter(token, files, others)
            if others:
                raise UserError(
                    f"the cache {self.root} on {socket.gethostname()} ({self.bound:,} bytes) had no room for "
                    f"{sum(sizes.values()):,} bytes beside the files that other processes fetch, for an hour; raise "
                    "EDT_CACHE_BYTES"
                )
            yield
        except BaseException:
            self._leave(token, failed=True)
            raise
        else:
            self._leave(token)
        finally:
            alive.release()
            Path(alive.lock_file).unlink(missing_ok=True)

    def _enter(self, token: str, files: Mapping[str, int], before: Collection[str] = ()) -> frozenset[str]:
        """Count the files that are missing if there is room for them, and return nothing; else the calls to wait for.

        `before` are those of the last attempt: while they stay the same, another look would find no more.
        """
        with self.lock_of(self.root / "room"):
            ledger = self._read()
            arriving = ledger.arriving()
            missing = {
                name: size for name, size in files.items() if name not in arriving and not self._is_there(name, size)
            }
            needed = sum(missing.values())
            others = frozenset(ledger.calls)
            fits = self._make_room(ledger, needed, {*files, *arriving}, look=not others or others != before)
            # Without other calls all else was removed: then only the disk is too small, and the download says so.
            if fits or not others:
                ledger.used += needed
                ledger.calls[token] = dict(files)
                others = frozenset()
            self._write(ledger)
        return others

    def _leave(self, token: str, *, failed: bool = False) -> None:
        """End a call. What a failed one has counted is not known, so the next one looks."""
        with self.lock_of(self.root / "room"):
            ledger = self._read()
            ledger.calls.pop(token, None)
            if failed:
                ledger.looked = 0.0
            self._write(ledger)

    def _make_room(self, ledger: _Ledger, needed: int, keep: Collection[str], *, look: bool) -> bool:
        """Remove files that are not in `keep`, least recently used first, until `needed` more bytes fit."""
        for again in (False, True):
            if again and look:
                self._look(ledger)
            seen = _seen.setdefault(self.root, deque())
            while not (fits := self._fits(ledger, needed)) and seen:
                used_at, size, path = seen.popleft()
                with suppress(FileNotFoundError):  # another process has removed it
                    if self._name(path) not in keep and path.stat().st_atime_ns == used_at:
                        path.unlink()
                        ledger.used -= size
            if fits:
                return True
        return False

    def _fits(self, ledger: _Ledger, needed: int) -> bool:
        """Whether so many more bytes are within the limit, and fit on the disk, which may hold other files too."""
        return ledger.used + needed <= self.bound and (not needed or needed <= shutil.disk_usage(self.root).free)

    def _read(self) -> _Ledger:
        """The ledger without calls whose process has ended, after a look at the files if that is due."""
        try:
            ledger = _Ledger(**json.loads((self.root / _LEDGER).read_bytes()))
            ended = [token for token in ledger.calls if not self._lives(token)]
        except (OSError, ValueError, TypeError):
            ledger, ended = _Ledger(0, 0.0), []
        for token in ended:
            del ledger.calls[token]
        if ended or not 0 <= time.time() - ledger.looked < _LOOK_EVERY_S:
            self._look(ledger)
        return ledger

    def _write(self, ledger: _Ledger) -> None:
        path = self.root / _LEDGER
        part = path.with_name(f".{_LEDGER}")
        try:
            part.write_text(json.dumps(asdict(ledger)), encoding="utf-8")
            part.replace(path)
        except OSError:  # a full disk: without a ledger the next call looks
            part.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def _look(self, ledger: _Ledger) -> None:
        """Count all files, remember which could be removed, and remove parts of killed downloads."""
        arriving, used, there, found = ledger.arriving(), 0, set[str](), list[tuple[int, int, Path]]()
        for path in self._files():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            target = _target_of(path)
            name = self._name(target)
            if path == target:
                used += status.st_size
                there.add(name)
                found.append((status.st_atime_ns, status.st_size, path))
            elif not self._remove_if_unlocked(path, target) and name not in arriving:
                used += status.st_size
        ledger.used = used + sum(size for name, size in arriving.items() if name not in there)
        ledger.looked = time.time()
        _seen[self.root] = deque(sorted(found))

    def _files(self) -> Iterator[Path]:
        """The files and parts of files that the cache wrote: the folder EDT_CACHE_DIR may have other content too."""
        for tree in ("objects", "files"):
            for folder, _, names in os.walk(self.root / tree):
                yield from (path for name in names if self._is_own(path := Path(folder, name)))

    def _is_own(self, path: Path) -> bool:
        """Whether the cache wrote a file: its name has the right form, and it is neither a link nor changed since."""
        target = _target_of(path)
        if path.is_symlink() or (path.name.startswith(".") and target is path):
            return False
        tree, *folders, name = target.relative_to(self.root).parts
        if tree == "objects":
            return _SHA256.fullmatch(name) is not None and folders == [name[:2]]
        if not folders or _URI_KEY.fullmatch(folders[0]) is None:
            return False
        with suppress(FileNotFoundError):  # another process has evicted it
            return path != target or path.stat().st_mtime_ns == SEALED_NS
        return False

    def _remove_if_unlocked(self, part: Path, target: Path) -> bool:
        """Remove the part of a killed download, which is one whose target is not locked. Return whether it was."""
        try:
            with self.lock_of(target).acquire(timeout=0):
                part.unlink(missing_ok=True)
                return True
        except Timeout:
            return False

    def _is_there(self, name: str, size: int) -> bool:
        with suppress(FileNotFoundError):
            return (self.root / name).stat().st_size == size
        return False

    def _alive(self, token: str) -> FileLock:
        """The lock that a call holds until it ends; the operating system releases it when its process ends."""
        folder = self.root / _CALLS
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{token}.lock")

    def _lives(self, token: str) -> bool:
        lock = self._alive(token)
        try:
            with lock.acquire(timeout=0):
                Path(lock.lock_file).unlink(missing_ok=True)
                return False
        except Timeout:
            return True

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _target_of(path: Path) -> Path:
    """The final path of a hidden `.part`; any other path unchanged."""
    part = _PART.fullmatch(path.name)
    return path.with_name(part[1]) if part else path
