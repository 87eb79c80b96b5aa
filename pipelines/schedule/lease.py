"""A lease on a name in a store: of all processes, on this machine or another, one holds it. No clock decides anything.

The lease is the file `.leases/<name>/<generation>.json` of the highest generation. Its holder writes it again with a
higher beat every few seconds; `released` in it says that nobody holds. Whoever wants it looks at it once a beat: if the
bytes change, the holder lives; if they do not change in several looks, it counts as dead. A dead or a released
generation is followed by the next one, created by a conditional write (a hard link on a disk).

Why at most one holds:
- The file of the highest generation is never removed, only followed by a higher one; so the highest generation never
  goes down. Takers remove lower ones, so that one small file stays.
- Two takers create the same next generation: the conditional write lets one through.
- A taker that stalls between look and write may create a generation that others have left behind. It lists after its
  write and finds a higher one, because that was there before its own could be free again: it withdraws.
- A holder that was paused until it counted as dead writes, at most, its own lower file again. It lists after each beat,
  finds the higher generation, removes its file, and knows that it has lost.
- A release during a watch is a change of bytes with `released` in them: the watcher takes the next generation.
- Looks are counted, not seconds: a watcher that was itself paused together with the holder is not misled.
What is left is the time between a holder's pause and its next beat, when it does not know yet; artifacts are safe then
as well, by their manifests.

In a local store a lock of the operating system is held beside it: it is free at the moment its holder dies, so there
one need not wait. Another kernel (a network disk without shared locks) is told by its beats, as in an object store.
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
_LOOKS = 4  # without a beat, after which a holder counts as dead
_MAX_EVERY_S = 60.0
_TRIES = 20
_GENERATION = re.compile(r"(\d{10})\.json")


class Taken(Exception):  # noqa: N818  not an error, but an answer
    """Somebody holds the lease: `owner` is what they said of themselves."""

    def __init__(self, owner: Mapping[str, Any]) -> None:
        self.owner = dict(owner)
        super().__init__(who(owner))


def who(owner: Mapping[str, Any]) -> str:
    """An owner for people."""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"


def this_process(**more: Any) -> dict[str, Any]:
    """What a process says of itself; the time is for people to read."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, **more}


@dataclass
class Lease(AbstractContextManager["Lease"]):
    """A lease that is held until `release`, or until it is lost: another counted this holder as dead."""

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
        """Whether another holds it by now, as of the last beat."""
        return self._lost

    def start(self) -> "Lease":
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Give it back, so that the next one need not wait. Does not raise: a lease that stays behind is outwaited."""
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
            with suppress(Exception):  # a store that cannot be reached for a moment: the next beat tries again
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

    Raises Taken, which says who holds it, at the holder's next beat at the latest.

    A dead holder is outwaited: some of its beats in an object store, no time in a local store of this machine.
    `on_lost` is called in another thread when the lease is lost.
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
    """Create the generation after a free or dead one, and return it."""
    for _ in range(_TRIES):
        found = _newest(folder)
        if found is not None and not _is_free(folder, found) and not _is_dead(folder, found):
            continue
        generation, data = (found[0] if found else 0) + 1, _bytes(record)
        if not folder.write_bytes(_file(generation), data, exclusive=True):
            continue
        # Read back: on a store without conditional writes, the last of two writers has it.
        if max(_generations(folder)) == generation and folder.read_bytes(_file(generation)) == data:
            for older in _generations(folder):
                if older < generation:
                    folder.remove(_file(older))
            return generation
        if max(_generations(folder)) > generation:
            folder.remove(_file(generation))
    raise Taken(_read(_newest(folder)).get("owner", {}))


def _is_free(folder: Folder, found: tuple[int, bytes]) -> bool:
    """Whether nobody holds a generation. Of this kernel's processes, its lock tells: it is ours by now."""
    record = _read(found)
    return bool(record.get("released")) or (folder.local is not None and record.get("kernel") == _kernel())


def _is_dead(folder: Folder, found: tuple[int, bytes]) -> bool:
    """Look at a holder for some of its beats: True if it shows none, False if it releases. Raises Taken if it lives."""
    every_s = min(max(float(_read(found).get("every_s", EVERY_S)), 0.01), _MAX_EVERY_S)
    for _ in range(_LOOKS):
        time.sleep(every_s)
        if (now := _newest(folder)) != found:
            if now is None or _read(now).get("released"):
                return False
            raise Taken(_read(now).get("owner", {}))
    return True


def _newest(folder: Folder) -> tuple[int, bytes] | None:
    """The highest generation and its bytes."""
    while generations := _generations(folder):
        with suppress(FileNotFoundError):  # followed by a higher one since the listing
            return max(generations), folder.read_bytes(_file(max(generations)))
    return None


def _generations(folder: Folder) -> list[int]:
    return [int(match[1]) for name in folder.names() if (match := _GENERATION.fullmatch(name))]


def _file(generation: int) -> str:
    return f"{generation:010d}.json"


def _bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def _read(found: tuple[int, bytes] | None) -> dict[str, Any]:
    try:
        value = json.loads(found[1]) if found else {}
    except ValueError:
        value = {}
    return value if isinstance(value, dict) else {}


def _guard(folder: Folder) -> FileLock | None:
    """The lock of the operating system in a local store. Raises Taken where a living process holds it."""
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
    """What the holder of the guard says of itself: it takes the guard first, and writes a moment later."""
    for _ in range(_TRIES):
        record = _read(_newest(folder))
        if record and not record.get("released"):
            break
        time.sleep(0.1)
    return dict(record.get("owner", {}))


def _kernel() -> str:
    """What processes under one kernel share, and with it their locks on files."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return socket.gethostname()
