"""What a full cache costs a streamed block: `python -m tests.benchmarks.cache_room WORK [FILES] [BLOCKS]`, in WORK.

Fills the cache with FILES made-up files of one byte each, so that it is full, and calls for BLOCKS blocks of 8 files
that are not there. Prints the processor time of a call and of a look at every file, and how many calls looked. Then
four threads call for blocks at the same time, and the most files that were there at a time are compared with the limit.
"""

import hashlib
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edt_core.store.cache import Cache
from edt_core.store.room import SEALED_NS, Room
from jobs.benchmark.table import hardware

BLOCK, THREADS = 8, 4


def place_of(root: Path, text: str) -> Path:
    """Where the cache has a file of this content."""
    name = hashlib.sha256(text.encode()).hexdigest()
    return root / "objects" / name[:2] / name


def fill(root: Path, files: int) -> None:
    """Files of the cache, in the order of their numbers of use."""
    for number in range(files):
        path = place_of(root, f"old {number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, ns=(SEALED_NS + number, SEALED_NS))


def main(work: Path, files: str = "10000", blocks: str = "200") -> None:
    """Print processor time by call, and the most files at a time."""
    looks, look = [0.0], Room._look

    def timed(self: Room, ledger: object) -> None:
        started = time.process_time()
        look(self, ledger)  # type: ignore[arg-type]
        looks.append(time.process_time() - started)

    Room._look = timed  # type: ignore[method-assign]
    cache = Cache(work / "cache", int(files))
    fill(cache.root, int(files))
    room = Room(cache.root, cache.bound, cache._lock)
    paths = [place_of(cache.root, f"new {number}") for number in range(int(blocks) * BLOCK)]
    started = time.process_time()
    for number in range(int(blocks)):
        with room.kept(dict.fromkeys(part := paths[number * BLOCK : (number + 1) * BLOCK], 1)):
            arrive(part)
    each = (time.process_time() - started) / int(blocks)
    print(f"{int(files):,} files, {int(blocks):,} blocks of {BLOCK}, {hardware()}\n")
    print(f"processor time of a block: {1e3 * each:.2f} ms, with {len(looks) - 1} looks of {1e3 * max(looks):.0f} ms")
    most = together(work / "small")
    print(f"most files at a time of {THREADS} threads: {most:,} of at most {THREADS * BLOCK // 2:,}")


def arrive(paths: list[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, ns=(time.time_ns(), SEALED_NS))


def together(root: Path) -> int:
    """The most files in a cache with room for the blocks of half of the threads."""
    bound = THREADS * BLOCK // 2
    cache, most, lock = Cache(root, bound), [0], threading.Lock()
    room = Room(cache.root, cache.bound, cache._lock)
    root.mkdir(parents=True, exist_ok=True)

    def run(thread: int) -> None:
        for number in range(10):
            part = [place_of(root, f"{thread} {number} {place}") for place in range(BLOCK)]
            with room.kept(dict.fromkeys(part, 1)):
                arrive(part)
                with lock:
                    most.append(sum(1 for path in (root / "objects").rglob("*") if path.is_file()))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, range(THREADS)))
    return max(most)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
