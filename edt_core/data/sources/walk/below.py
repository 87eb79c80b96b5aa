"""The files of a source, found at any depth of a folder."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
import pyarrow as pa

from edt_core.data.sources.files import THREADS, as_text, extension, read_errors
from edt_core.data.sources.walk.disk import disk_entries, stat_of, walk_disk
from edt_core.data.sources.walk.entry import STAT, Entry
from edt_core.data.sources.walk.store import Below, store_entries, store_file, walk_store
from edt_core.data.tables import MappedTable, Sorter
from edt_core.progress import Progress
from edt_core.store.folder import Folder

_LONG_S = 0.05  # less says nothing of a disk
_ENTRIES = 4096  # files that are Python objects at a time
Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Files:
    """Rows of name (binary), size (int64) and, if remote, version (string), else STAT (uint64), sorted by name.

    `others` counts the files that were not selected, by extension, for each folder that contains some; a folder
    directly in the source is listed even without such files. The name of the source itself is empty.
    """

    rows: MappedTable
    others: dict[bytes, Counter[str]]

    @property
    def table(self) -> pa.Table:
        """All rows."""
        return self.rows.table

    @property
    def left_out(self) -> Counter[str]:
        """Files that were not selected, by extension."""
        return sum(self.others.values(), Counter())

    @property
    def names(self) -> list[bytes]:
        return list(self.table["name"].to_pylist())


def entries(root: Folder, folder: bytes = b"") -> list[Entry]:
    """The files and folders directly in a folder of the source, sorted by name, without dotfiles.

    Names are relative to `root`. Raises UserError for a folder that cannot be read: its images would be lost silently.
    """
    if (path := root.local) is not None:
        return sorted(disk_entries(os.fsencode(path), folder))
    return sorted(store_entries(root, folder))


def files_below(root: Folder, keep: Callable[[bytes], bool], progress: Progress, *, recursive: bool = True) -> Files:
    """The files at any depth whose relative name `keep` accepts. Slow sub-folders are listed in parallel."""
    top = entries(root)
    # In order of the names below them, so that a disk's files arrive almost sorted.
    folders = sorted((e.name for e in top if e.is_folder), key=lambda name: name + b"/") if recursive else []
    is_remote = root.local is None

    def part(files: Iterator[Entry]) -> dict[bytes, Counter[str]]:
        selection: list[Entry] = []
        others: dict[bytes, Counter[str]] = {}
        for entry in files:
            if keep(entry.name):
                selection.append(entry)
                if len(selection) == _ENTRIES:
                    sorter.add(_table(selection, is_remote))
                    selection.clear()
            else:
                others.setdefault(entry.name.rpartition(b"/")[0], Counter())[extension(entry.name)] += 1
        sorter.add(_table(selection, is_remote))
        return others

    def of_disk(path: bytes, folder: bytes) -> dict[bytes, Counter[str]]:
        return part(walk_disk(path, folder))

    def of_store(below: Below) -> tuple[dict[bytes, Counter[str]], list[Below]]:
        more: list[Below] = []
        return part(walk_store(root, below, more)), more

    with Sorter(_table([], is_remote).schema, by="name") as sorter:
        others = {folder: Counter[str]() for folder in (b"", *folders)}
        others |= part(entry for entry in top if not entry.is_folder)
        if (path := root.local) is None:
            results = _in_growing_threads(of_store, [Below(folder) for folder in folders])
        else:
            on_disk = in_threads_if_slow(partial(of_disk, os.fsencode(path)), folders)
            results = ((result, len(folders)) for result in on_disk)
        for done, (result, total) in enumerate(results, 1):
            for folder, counts in result.items():
                others.setdefault(folder, Counter()).update(counts)
            progress.update(done, total, "folders listed")
        return Files(sorter.finish(), others)


def _in_threads(work: Callable[[bytes], Result], folders: Sequence[bytes]) -> Iterator[Result]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(work, folders)


def _in_growing_threads(
    work: Callable[[Item], tuple[Result, list[Item]]], items: Sequence[Item]
) -> Iterator[tuple[Result, int]]:
    """(result, number of items so far) of each item as it is done. `work` also returns further items."""
    total = len(items)
    with ThreadPoolExecutor(THREADS) as pool:
        pending = {pool.submit(work, item) for item in items}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    result, more = future.result()
                    pending |= {pool.submit(work, item) for item in more}
                    total += len(more)
                    yield result, total
        finally:
            for future in pending:
                future.cancel()


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
            file = Entry(name, False, status.st_size, "", stat_of(status))
        else:
            file = store_file(root, name)
    return Files(MappedTable(_table([file], with_version=root.local is None)), {})


def _table(files: Sequence[Entry], with_version: bool) -> pa.Table:
    columns = {
        "name": pa.array([entry.name for entry in files], pa.binary()),
        "size": pa.array([entry.size for entry in files], pa.int64()),
    }
    if with_version:
        return pa.table({**columns, "version": pa.array([entry.version for entry in files], pa.string())})
    values = chain.from_iterable(entry.stat for entry in files)
    stats = np.fromiter(values, np.uint64, len(files) * len(STAT)).reshape(-1, len(STAT))
    return pa.table({**columns, **{name: pa.array(stats[:, k]) for k, name in enumerate(STAT)}})
