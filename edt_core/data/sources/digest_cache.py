"""The digests of a local source's images, remembered by what the file system says of their files.

A file whose size, times of modification and change, inode and device are what they were when it was read is not read
again. An entry is only made of a file that was the same before and after it was read, and that nobody had written to
for two seconds: what is written within the same tick of a file system's clock could look the same.

The cache is one Arrow file for a source's folder, below `digests/` of this node's cache. It is written whole and
appears atomically; of two processes that write it the last one wins, and what the other had read is read once more.
Legend: F files, N images, M images of all files. A stat is uint64 [5]: size, mtime_ns, ctime_ns, inode, device.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from edt_core.data.sources.walk import STAT, stat_of
from edt_core.data.tables import MappedTable, bytes_column, digests_in, mapped
from edt_core.data.tables.arrow_file import map_file
from edt_core.errors import UserError
from edt_core.store.cache import cache_folder

FOLDER = "digests"
_FORMAT = "edt-digests-1"
_SETTLED_NS = 2_000_000_000
STAT_COLUMNS = ("size", *STAT)
_MTIME, _CTIME = 1, 2
_ROWS = 1 << 16  # files of a record batch
_LOOKED_AT = 1 << 12  # files that a thread looks at together
_THREADS = 8
SCHEMA = pa.schema(
    [
        ("name", pa.binary()),
        *((name, pa.uint64()) for name in STAT_COLUMNS),
        ("offsets", pa.large_list(pa.int64())),
        ("digests", pa.large_list(pa.binary(32))),
    ]
)
Stats = NDArray[np.uint64]
Digests = NDArray[np.uint8]


@dataclass(frozen=True)
class Remembered:
    """What is known of files: their names, stats [F, 5], and of their images in order the offsets [M] and digests.

    starts: int64 [F + 1], the first image of each file. offsets: int64 [M]. digests: uint8 [M, 32].
    """

    names: pa.ChunkedArray
    stats: Stats
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    digests: Digests

    def __len__(self) -> int:
        return len(self.stats)

    @classmethod
    def nothing(cls) -> "Remembered":
        """No file at all."""
        return cls.of_table(SCHEMA.empty_table())

    @classmethod
    def of_table(cls, table: pa.Table) -> "Remembered":
        """What an Arrow table of the cache's schema holds."""
        counts = _numpy(pc.list_value_length(table["offsets"]), np.int64)
        values = [chunk.flatten() for chunk in table["digests"].chunks]
        blocks = [digests_in(block) for block in values]
        return cls(
            table["name"],
            stats_in(table),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            _numpy(pc.list_flatten(table["offsets"]), np.int64),
            np.concatenate([np.empty((0, 32), np.uint8), *blocks]),
        )

    def batches(self, files: NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
        """These files as record batches of the cache's schema, each small beside the whole."""
        for first in range(0, len(files), _ROWS):
            part = files[first : first + _ROWS]
            counts = self.starts[part + 1] - self.starts[part]
            starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            images = np.repeat(self.starts[part] - starts[:-1], counts) + np.arange(starts[-1])
            columns = [
                pa.concat_arrays(self.names.take(pa.array(part)).chunks),
                *(pa.array(self.stats[part, column]) for column in range(len(STAT_COLUMNS))),
                pa.LargeListArray.from_arrays(pa.array(starts), pa.array(self.offsets[images])),
                pa.LargeListArray.from_arrays(pa.array(starts), bytes_column(self.digests[images])),
            ]
            yield pa.record_batch(columns, schema=SCHEMA)

    def place_of(self, names: pa.ChunkedArray) -> NDArray[np.int64]:
        """The index of each name among the files; -1 if it is missing."""
        if names.equals(self.names):  # the usual case: nothing was added or removed
            return np.arange(len(names))
        if not len(self):
            return np.full(len(names), -1, np.int64)
        found = pc.fill_null(pc.index_in(names, value_set=self.names), -1)
        return _numpy(found, np.int64)


@dataclass(frozen=True)
class Listed:
    """The files of a listing and the images in them, in order of file: `file` int64 [N] is that of each image.

    stats: what the file system said of each file [F, 5] when it was listed; None for archives, where an image's size
    is not that of its file.
    """

    names: pa.ChunkedArray
    file: NDArray[np.int64]
    offsets: NDArray[np.int64]
    stats: Stats | None


def local_digests(
    root: Path,
    access: str,
    listed: Listed,
    read: Callable[[NDArray[np.int64]], Iterator[bytes]],
    unreadable: bytes,
    again: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> Digests:
    """The digest of each listed image, uint8 [N, 32]; only what is not remembered is read.

    `read(places)` yields the digests of the images at these places of the listing; one that is `unreadable` is never
    remembered. With `again` everything is read. What `read` raises is raised.
    """
    path = cache_path(root, access)
    began_ns = time.time_ns()
    before = stats_of(root, listed.names) if listed.stats is None else listed.stats
    remembered = load(path, root, access, warn)
    there, is_renamed = _same_files(listed, before, Remembered.nothing() if again else remembered)
    digests, known = _known(listed, there, remembered)
    unread = np.flatnonzero(~known)
    for place, digest in zip(unread.tolist(), read(unread), strict=True):
        digests[place] = np.frombuffer(digest, np.uint8)
    news = np.flatnonzero(~known | is_renamed[listed.file])
    if len(news):
        fresh = _settled(root, listed, before, began_ns, digests, news, np.frombuffer(unreadable, np.uint8))
        if len(fresh):
            kept = _still_true(root, remembered, listed, fresh)
            parts = chain(remembered.batches(kept), fresh.batches(np.arange(len(fresh))))
            save(path, root, access, lambda: mapped(parts, SCHEMA), len(fresh), warn)
    return digests


def cache_path(root: Path, access: str) -> Path:
    """Where the digests of a source's folder are remembered."""
    key = hashlib.sha256(os.fsencode(root) + b"\0" + access.encode()).hexdigest()[:32]
    return cache_folder() / FOLDER / f"{key}.arrow"


def stats_in(table: pa.Table) -> Stats:
    """The stats in the columns of a table of files, uint64 [F, 5]."""
    return np.stack([_numpy(table[name], np.uint64) for name in STAT_COLUMNS], axis=1)


def stats_of(root: Path, names: pa.ChunkedArray) -> Stats:
    """What the file system says of files below a folder, uint64 [F, 5]; zeros for one that is not there."""
    base, out = os.fsencode(root) + b"/", np.zeros((len(names), len(STAT_COLUMNS)), np.uint64)

    def look(first: int) -> None:
        for place, name in enumerate(names.slice(first, _LOOKED_AT).to_pylist(), first):
            with suppress(OSError):
                status = os.stat(base + name)
                out[place] = (status.st_size, *stat_of(status))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(look, range(0, len(names), _LOOKED_AT)))
    return out


def _same_files(listed: Listed, stats: Stats, remembered: Remembered) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The remembered place of each listed file that is untouched, or -1, [F], and whether it had another name then.

    A folder that is renamed leaves everything of its files as it was, but for their names.
    """
    there = remembered.place_of(listed.names)
    exists = stats.any(axis=1)
    same = exists & (there >= 0)
    same[same] = (remembered.stats[there[same]] == stats[same]).all(axis=1)
    others = np.flatnonzero(exists & ~same)
    by_stat = _place_of_stats(stats[others], remembered.stats)
    by_stat[~_same_base_names(listed.names, others, remembered.names, by_stat)] = -1
    places = np.where(same, there, -1)
    places[others] = by_stat
    is_renamed = np.zeros(len(places), np.bool_)
    is_renamed[others] = by_stat >= 0
    return places, is_renamed


def _same_base_names(
    names: pa.ChunkedArray, places: NDArray[np.int64], others: pa.ChunkedArray, other_places: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether files have the same name within their folders, bool [n]; false for a place of -1."""
    same, found = np.zeros(len(places), np.bool_), np.flatnonzero(other_places >= 0)
    if len(found):
        now = names.take(pa.array(places[found])).to_pylist()
        then = others.take(pa.array(other_places[found])).to_pylist()
        same[found] = [os.path.basename(a) == os.path.basename(b) for a, b in zip(now, then, strict=True)]
    return same


def _place_of_stats(wanted: Stats, stats: Stats) -> NDArray[np.int64]:
    """The index of each wanted stat among others; -1 if it is missing."""
    if not len(wanted) or not len(stats):
        return np.full(len(wanted), -1, np.int64)

    found = pc.index_in(bytes_column(wanted), value_set=bytes_column(stats))
    return np.asarray(pc.fill_null(found, -1)).astype(np.int64)


def _known(listed: Listed, there: NDArray[np.int64], remembered: Remembered) -> tuple[Digests, NDArray[np.bool_]]:
    """Digests [N, 32] of the listed images and which of them are known: all of a file's images, or none.

    there: the remembered place of each file that is untouched, or -1.
    """
    digests = np.zeros((len(listed.file), 32), np.uint8)
    same = there >= 0
    if listed.stats is not None:  # an image a file
        rows = remembered.starts[there[listed.file]]
        known = same[listed.file]
        digests[known] = remembered.digests[rows[known]]
        return digests, known
    known = np.zeros(len(listed.file), np.bool_)
    in_order = np.argsort(listed.file, kind="stable")
    bounds = np.searchsorted(listed.file[in_order], np.arange(len(listed.names) + 1))
    for file in np.flatnonzero(same).tolist():
        images = in_order[bounds[file] : bounds[file + 1]]
        start, stop = remembered.starts[there[file] : there[file] + 2]
        offsets = remembered.offsets[start:stop]
        at = np.searchsorted(offsets, listed.offsets[images])
        if (at < len(offsets)).all() and (offsets[at] == listed.offsets[images]).all():
            known[images] = True
            digests[images] = remembered.digests[start + at]
    return digests, known


def _settled(
    root: Path,
    listed: Listed,
    before: Stats,
    began_ns: int,
    digests: Digests,
    unread: NDArray[np.int64],
    unreadable: Digests,
) -> Remembered:
    """The files that were read and may be remembered: the same before and after, and at rest when it began."""
    files = np.unique(listed.file[unread])
    names = pa.chunked_array([listed.names.combine_chunks().take(pa.array(files))], pa.binary())
    whole = at_rest(root, names, before[files], began_ns)
    place = np.full(len(listed.names), -1, np.int64)
    place[files[whole]] = np.arange(whole.sum())
    wanted = (place[listed.file] >= 0) & (digests != unreadable).any(axis=1)
    images = np.flatnonzero(wanted)
    images = images[np.lexsort((listed.offsets[images], place[listed.file[images]]))]
    counts = np.bincount(place[listed.file[images]], minlength=int(whole.sum()))
    has_images = counts > 0
    return Remembered(
        pa.chunked_array([names.combine_chunks().filter(pa.array(whole)).filter(pa.array(has_images))], pa.binary()),
        before[files[whole]][has_images],
        np.concatenate([[0], np.cumsum(counts[has_images])]).astype(np.int64),
        listed.offsets[images],
        digests[images],
    )


def at_rest(root: Path, names: pa.ChunkedArray, before: Stats, began_ns: int) -> NDArray[np.bool_]:
    """Whether each file, with these stats [F, 5] before it was read, has them still and was at rest: it may be kept."""
    times = before[:, [_MTIME, _CTIME]].astype(np.int64)
    # A file system that keeps no change time of its own, as an image of one with fixed times, cannot show a change.
    has_change_time = (times[:, 0] != times[:, 1]) | (times[:, 1] % 1_000_000_000 != 0)
    settled = (times[:, 1] < began_ns - _SETTLED_NS) & (np.abs(times[:, 0] - began_ns) > _SETTLED_NS)
    same: NDArray[np.bool_] = (stats_of(root, names) == before).all(axis=1)
    return before.any(axis=1) & same & has_change_time & settled


def as_rows(names: pa.ChunkedArray, stats: Stats, digests: Digests) -> pa.Table:
    """Rows of the cache for files that are an image each."""
    number = len(names)
    starts = pa.array(np.arange(number + 1))
    columns = [
        names,
        *(pa.array(stats[:, column]) for column in range(len(STAT_COLUMNS))),
        pa.LargeListArray.from_arrays(starts, pa.array(np.zeros(number, np.int64))),
        pa.LargeListArray.from_arrays(starts, bytes_column(digests)),
    ]
    return pa.table(columns, schema=SCHEMA)


def _still_true(root: Path, remembered: Remembered, listed: Listed, fresh: Remembered) -> NDArray[np.int64]:
    """The remembered files that were not read now and are unchanged: another choice of classes may list them."""
    if not len(remembered):
        return np.empty(0, np.int64)
    others = np.flatnonzero(fresh.place_of(remembered.names) < 0)
    now = stats_of(root, pa.chunked_array([remembered.names.combine_chunks().take(pa.array(others))], pa.binary()))
    return others[(now == remembered.stats[others]).all(axis=1)]


def load(path: Path, root: Path, access: str, warn: Callable[[str], None] = lambda message: None) -> Remembered:
    """The contents of the cache file; empty, with a warning, if it is damaged or belongs to something else."""
    return Remembered.of_table(open_cache(path, root, access, warn).table)


def open_cache(path: Path, root: Path, access: str, warn: Callable[[str], None]) -> MappedTable:
    """The cache file, mapped; empty, with a warning, if it is damaged or belongs to something else."""
    try:
        with path.open("rb") as file:
            rows = map_file(file)
        metadata = rows.table.schema.metadata or {}
        stated = (_FORMAT.encode(), os.fsencode(root), access.encode())
        if tuple(metadata.get(key) for key in (b"format", b"root", b"access")) != stated:
            raise ValueError("it is of another source or another version")
        if not rows.table.schema.equals(SCHEMA) or metadata.get(b"seal") != _seal(rows.batches()):
            raise ValueError("its content does not agree with its seal")
        return replace(rows, table=rows.table.replace_schema_metadata(None))
    except FileNotFoundError:
        return MappedTable(SCHEMA.empty_table())
    except (OSError, ValueError, pa.ArrowException) as error:
        warn(f"the remembered digests {path} are not used, so all images are read: {str(error).splitlines()[0]}")
        return MappedTable(SCHEMA.empty_table())


def save(
    path: Path, root: Path, access: str, rows: Callable[[], MappedTable], fresh: int, warn: Callable[[str], None]
) -> None:
    """Write the rows, of which `fresh` are new, whole or not at all; a warning if they cannot be written."""
    about = {b"format": _FORMAT.encode(), b"root": os.fsencode(root), b"access": access.encode()}
    staged = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns()}")
    try:
        content = rows()
        schema = SCHEMA.with_metadata({**about, b"seal": _seal(content.batches())})
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in content.batches():
                    writer.write_batch(batch)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except (OSError, UserError) as error:
        warn(
            f"the digests of {fresh:,} files cannot be remembered in {path.parent}, and the next run reads them "
            f"again: {getattr(error, 'strerror', None) or error}; set EDT_CACHE_DIR to a folder that can be written"
        )


def _seal(batches: Iterable[pa.RecordBatch]) -> bytes:
    """Hex sha256 over the rows, whatever the schema's metadata says."""
    total = hashlib.sha256()
    for batch in batches:
        total.update(batch.replace_schema_metadata(None).serialize())
    return total.hexdigest().encode()


def _numpy(column: pa.ChunkedArray, kind: type) -> NDArray:
    return np.concatenate(
        [np.empty(0, kind), *(chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks)]
    ).astype(kind, copy=False)
