"""A lease on a name in a store: at most one process, on any machine, holds it. No decision depends on a clock.

The lease is the file `.leases/<name>/<generation>.json` with the highest generation. Its holder rewrites it with a
higher beat every few seconds; `released` in it means that no process holds the lease. A process that needs the lease
reads the file once a beat. If the bytes change, the holder is alive; if several reads show no change, it counts as
dead. A dead or released generation is followed by the next one, which is created by a conditional write (a hard link
on a disk).

Why at most one process holds it:
- The file of the highest generation is never removed, only followed by a higher one, so the highest generation never
  decreases. Takers remove lower ones, so one small file remains.
- Two takers create the same next generation: the conditional write lets only one of them succeed.
- A taker that stalls between read and write may create a generation that is already superseded. It lists the folder
  after its write and finds a higher one, because that one existed before its own could be free again. It withdraws.
- A holder that was paused until it counted as dead can only rewrite its own lower file. It lists the folder after each
  beat, finds the higher generation, removes its file, and knows that it has lost the lease.
- A release during a watch changes the bytes and sets `released`: the watcher takes the next generation.
- Reads are counted, not seconds: a watcher that was paused together with the holder is not misled.
One gap remains: a paused holder does not know of its loss until its next beat. Artifacts are safe even then, because
of their manifests.

In a local store the holder also has a lock of the operating system. It is released when the holder dies, so nobody
has to wait. A holder under another kernel (a network disk without shared locks) is recognised by its beats, as in an
object store.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from edt_core.store.errors import clear_disk_errors
from edt_core.store.folder import Folder

EVERY_S = 5.0
_LOOKS = 4  # reads without a new beat, after which a holder counts as dead
_MAX_EVERY_S = 60.0
_TRIES = 20
_GENERATION = re.compile(r"(\d{10})\.json")


class Taken(Exception):  # noqa: N818  a result, not an error
    """Another process holds the lease: `owner` is its description of itself."""

    def __init__(self, owner: Mapping[str, Any]) -> None:
        self.owner = dict(owner)
        super().__init__(who(owner))


def who(owner: Mapping[str, Any]) -> str:
    """One line that describes an owner."""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"


def this_process(**more: Any) -> dict[str, Any]:
    """This process's description of itself; the time is for people only."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, **more}


@dataclass
class Lease(AbstractContextManager["Lease"]):
    """A lease that is held until `release`, or until it is lost because another process counted the holder as dead."""

    folder: Folder
    generation: int
    record: dict[str, Any]
    guard: FileLock | None
    on_lost: Callable[[], None]
    _lost: bool = False
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether another process held the lease at the last beat."""
        return self._lost

    def start(self) -> "Lease":
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Release the lease, so that the next holder need not wait. Never raises."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if not self._lost:
            with suppress(Exception):
                self._write(released=True)
        if self.guard is not None:
            self.guard.release()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._over.wait(self.record["every_s"]) and not self._lost:
            with suppress(Exception):  # the store may be unreachable for a moment: the next beat tries again
                self._write(beat=self.record["beat"] + 1)

    def _write(self, **changed: Any) -> None:
        self.record |= changed
        self.folder.write_bytes(_file(self.generation), _bytes(self.record))
        if max(_generations(self.folder), default=0) > self.generation:
            self.folder.remove(_file(self.generation))
            self._lost = True
            self.on_lost()


def hold(
    store: Folder,
    name: str,
    owner: Mapping[str, Any],
    every_s: float = EVERY_S,
    on_lost: Callable[[], None] = lambda: None,
) -> Lease:
    """Take the lease `name` of a store, for a `with` block or until `release`.

    Raises Taken, with the holder, at the holder's next beat at the latest. If the holder is dead, the call waits for
    some of its beats in an object store, and not at all in a local store of this machine. `on_lost` is called in
    another thread when the lease is lost.
    """
    folder = store.child(f".leases/{quote(name, safe='')}")
    guard = _guard(folder)
    record = {
        "owner": dict(owner),
        "beat": 0,
        "every_s": min(every_s, _MAX_EVERY_S),
        "released": False,
        "token": uuid.uuid4().hex,
        "kernel": _kernel(),
    }
    try:
        return Lease(folder, _take(folder, record), record, guard, on_lost).start()
    except BaseException:
        if guard is not None:
            guard.release()
        raise


def _take(folder: Folder, record: Mapping[str, Any]) -> int:
    """Create the generation that follows a free or dead one, and return it."""
    for _ in range(_TRIES):
        newest = _newest(folder)
        if newest is not None and not _is_free(folder, newest) and not _is_dead(folder, newest):
            continue
        generation, data = (newest[0] if newest else 0) + 1, _bytes(record)
        if not folder.write_bytes(_file(generation), data, exclusive=True):
            continue
        # Read back: on a store without conditional writes, the last writer has the lease.
        if max(_generations(folder)) == generation and folder.read_bytes(_file(generation)) == data:
            for older in _generations(folder):
                if older < generation:
                    folder.remove(_file(older))
            return generation
        if max(_generations(folder)) > generation:
            folder.remove(_file(generation))
    raise Taken(_read(_newest(folder)).get("owner", {}))


def _is_free(folder: Folder, newest: tuple[int, bytes]) -> bool:
    """Whether no process holds the newest generation: it is released, or of this kernel, whose lock we have by now."""
    record = _read(newest)
    return bool(record.get("released")) or (folder.local is not None and record.get("kernel") == _kernel())


def _is_dead(folder: Folder, newest: tuple[int, bytes]) -> bool:
    """Watch a holder for some beats: True if none comes, False if it releases. Raises Taken if it is alive."""
    every_s = min(max(float(_read(newest).get("every_s", EVERY_S)), 0.01), _MAX_EVERY_S)
    for _ in range(_LOOKS):
        time.sleep(every_s)
        if (now := _newest(folder)) != newest:
            if now is None or _read(now).get("released"):
                return False
            raise Taken(_read(now).get("owner", {}))
    return True


def _newest(folder: Folder) -> tuple[int, bytes] | None:
    """The highest generation and its bytes."""
    while generations := _generations(folder):
        with suppress(FileNotFoundError):  # removed since the listing: there is a higher one
            return max(generations), folder.read_bytes(_file(max(generations)))
    return None


def _generations(folder: Folder) -> list[int]:
    return [int(match[1]) for name in folder.names() if (match := _GENERATION.fullmatch(name))]


def _file(generation: int) -> str:
    return f"{generation:010d}.json"


def _bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def _read(newest: tuple[int, bytes] | None) -> dict[str, Any]:
    try:
        value = json.loads(newest[1]) if newest else {}
    except ValueError:
        value = {}
    return value if isinstance(value, dict) else {}


def _guard(folder: Folder) -> FileLock | None:
    """The operating system's lock in a local store, None elsewhere. Raises Taken if a living process holds it."""
    if (root := folder.local) is None:
        return None
    with clear_disk_errors(folder.uri):
        root.mkdir(parents=True, exist_ok=True)
        guard = FileLock(root / "lock", thread_local=False)
        try:
            guard.acquire(blocking=False)
        except Timeout:
            raise Taken(_owner(folder)) from None
    return guard


def _owner(folder: Folder) -> dict[str, Any]:
    """The description of the guard's holder, which takes the guard first and writes its record a moment later."""
    for _ in range(_TRIES):
        record = _read(_newest(folder))
        if record and not record.get("released"):
            break
        time.sleep(0.1)
    return dict(record.get("owner", {}))


def _kernel() -> str:
    """An identity of the running kernel. Processes under one kernel share locks on files."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return socket.gethostname()
