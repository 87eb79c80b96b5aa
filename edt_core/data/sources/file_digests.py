"""The digests of files that are an image each: the listing and the cache of digests, side by side in order of name.

Neither is in memory: a batch of one and the rows of the other between the same names are compared at a time. What the
cache holds, and when an entry may be made, is in `digest_cache`.
"""

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from edt_core.data.sources import digest_cache
from edt_core.data.sources.digest_cache import SCHEMA, STAT_COLUMNS, Digests, stats_in
from edt_core.data.tables import ROWS, MappedTable, Sorter, bytes_column, digests_in, is_ascending, mapped

_ACCESS = "file"
_LOOKED_UP = 1 << 18  # files without a known name that are looked up by their stat at a time


class _Known(NamedTuple):
    """Of each listed file its digest [N, 32], whether it is known, and whether it had another name; all [N].

    is_matched: bool, of each cached file whether it is listed and untouched.
    """

    digests: Digests
    is_known: NDArray[np.bool_]
    is_renamed: NDArray[np.bool_]
    is_matched: NDArray[np.bool_]


def file_digests(
    root: Path,
    rows: MappedTable,
    read: Callable[[NDArray[np.int64] | None], Iterator[bytes]],
    unreadable: bytes,
    again: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> Digests:
    """The digest of each listed file, uint8 [N, 32]; only what is not remembered is read.

    rows: name, size and the STAT columns, in order of name. `read(places)` yields the digests of these rows, or of all
    for None; one that is `unreadable` is never remembered. With `again` everything is read. What `read` raises is
    raised.
    """
    path = digest_cache.cache_path(root, _ACCESS)
    began_ns = time.time_ns()
    cached = _in_order(digest_cache.open_cache(path, root, _ACCESS, warn))
    known = _known(rows, cached, again)
    _read_unknown(known, read)
    if (~known.is_known | known.is_renamed).any():
        fresh = mapped(_fresh(root, rows, known, began_ns, np.frombuffer(unreadable, np.uint8)), SCHEMA)
        if len(fresh):
            parts = _updated(root, cached, known.is_matched, fresh)
            digest_cache.save(path, root, _ACCESS, lambda: mapped(parts, SCHEMA), len(fresh), warn)
    return known.digests


def _read_unknown(known: _Known, read: Callable[[NDArray[np.int64] | None], Iterator[bytes]]) -> None:
    """Read the digests that are not known."""
    places = np.flatnonzero(~known.is_known) if known.is_known.any() else None
    number = len(known.digests) if places is None else len(places)
    digests = read(places)
    for first in range(0, number, ROWS):
        part = slice(first, first + ROWS) if places is None else places[first : first + ROWS]
        block = b"".join(islice(digests, min(ROWS, number - first)))
        known.digests[part] = np.frombuffer(block, np.uint8).reshape(-1, 32)
    assert next(digests, None) is None, "more digests than files"


def _in_order(cached: MappedTable) -> MappedTable:
    """The cached files in order of name; those of an earlier version are not."""
    if is_ascending(cached, "name"):
        return cached
    with Sorter(SCHEMA, "name") as sorter:
        for batch in cached.batches():
            sorter.add(pa.Table.from_batches([batch]))
        return sorter.finish()


def _beside(rows: MappedTable, others: MappedTable) -> Iterator[tuple[pa.RecordBatch | None, int, pa.Table]]:
    """(a batch of `rows`, position of the first of the other rows, the other rows up to its last name), all once.

    Both are in order of name. The batch is None for the other rows after the last name.
    """
    waiting, held, position = others.batches(), others.table.schema.empty_table(), 0
    for batch in rows.batches():
        last = batch.column("name")[-1].as_py()
        while not len(held) or held["name"][-1].as_py() < last:
            if (more := next(waiting, None)) is None:
                break
            held = pa.concat_tables([held, pa.Table.from_batches([more])])
        cut = bisect_right(held["name"], last, key=lambda name: name.as_py())
        yield batch, position, held.slice(0, cut)
        held, position = held.slice(cut), position + cut
    for part in (held, *(pa.Table.from_batches([batch]) for batch in waiting)):
        if len(part):
            yield None, position, part
            position += len(part)


def _known(rows: MappedTable, cached: MappedTable, again: bool) -> _Known:
    """What the cache knows of the listed files: by name, then by stat, for the name of a folder may have changed."""
    number = len(rows)
    known = _Known(
        np.zeros((number, 32), np.uint8),
        np.zeros(number, np.bool_),
        np.zeros(number, np.bool_),
        np.zeros(len(cached), np.bool_),
    )
    if again or not len(cached):
        return known
    first = 0
    exists = np.zeros(number, np.bool_)
    for batch, position, part in _beside(MappedTable(rows.table.select(["name", *STAT_COLUMNS]), rows.pages), cached):
        if batch is None:
            break
        stats = stats_in(pa.Table.from_batches([batch]))
        exists[first : first + len(batch)] = stats.any(axis=1)
        at = _place_of(batch.column("name"), part["name"])
        found = np.flatnonzero((at >= 0) & stats.any(axis=1))
        found = found[(stats_in(part)[at[found]] == stats[found]).all(axis=1)]
        known.digests[first + found] = _digests_of(part)[at[found]]
        known.is_known[first + found] = True
        known.is_matched[position + at[found]] = True
        first += len(batch)
    others = np.flatnonzero(exists & ~known.is_known)
    for start in range(0, len(others), _LOOKED_UP):
        _find_by_stat(rows, cached, others[start : start + _LOOKED_UP], known)
    return known


def _place_of(names: pa.Array, among: pa.ChunkedArray) -> NDArray[np.int64]:
    """The index of each name among others; -1 if it is missing."""
    if not len(among):
        return np.full(len(names), -1, np.int64)
    return np.asarray(pc.fill_null(pc.index_in(names, value_set=among.combine_chunks()), -1)).astype(np.int64)


def _digests_of(table: pa.Table) -> Digests:
    """The digest of each cached file, uint8 [F, 32]: each has one."""
    blocks = [digests_in(chunk.flatten()) for chunk in table["digests"].chunks]
    digests = np.concatenate([np.empty((0, 32), np.uint8), *blocks])
    assert len(digests) == len(table)
    return digests


def _find_by_stat(rows: MappedTable, cached: MappedTable, places: NDArray[np.int64], known: _Known) -> None:
    """Note the digests of these listed files whose stat is that of a cached file of the same name in its folder."""
    wanted = rows.take(places).table
    encoded = bytes_column(stats_in(wanted)).dictionary_encode()
    codes = np.asarray(encoded.indices)
    names: dict[int, bytes] = {}
    digests = np.zeros((len(encoded.dictionary), 32), np.uint8)
    for batch in cached.batches():
        table = pa.Table.from_batches([batch])
        at = _place_of(bytes_column(stats_in(table)), pa.chunked_array([encoded.dictionary]))
        found = np.flatnonzero(at >= 0)
        for row, code in zip(found.tolist(), at[found].tolist(), strict=True):
            if code not in names:
                names[code] = batch.column("name")[row].as_py()
                digests[code] = _digests_of(table.slice(row, 1))[0]
    for place in np.flatnonzero(np.isin(codes, list(names))).tolist():
        if os.path.basename(wanted["name"][place].as_py()) == os.path.basename(names[codes[place]]):
            known.digests[places[place]] = digests[codes[place]]
            known.is_known[places[place]] = known.is_renamed[places[place]] = True


def _fresh(root: Path, rows: MappedTable, known: _Known, began_ns: int, unreadable: Digests) -> Iterator[pa.Table]:
    """The files that are new to the cache and may be remembered, as rows of it."""
    news = ~known.is_known | known.is_renamed
    first = 0
    for batch in MappedTable(rows.table.select(["name", *STAT_COLUMNS]), rows.pages).batches():
        places = np.flatnonzero(news[first : first + len(batch)])
        if len(places):
            part = pa.Table.from_batches([batch.take(pa.array(places))])
            digests = known.digests[first + places]
            stats = stats_in(part)
            may = digest_cache.at_rest(root, part["name"], stats, began_ns) & (digests != unreadable).any(axis=1)
            yield digest_cache.as_rows(part["name"].filter(pa.array(may)), stats[may], digests[may])
        first += len(batch)


def _updated(root: Path, cached: MappedTable, is_matched: NDArray[np.bool_], fresh: MappedTable) -> Iterator[pa.Table]:
    """The new content of the cache: the fresh files, and the others that are as they were.

    Another choice of classes may list those that are not listed now.
    """
    for batch, position, part in _beside(fresh, cached):
        kept = is_matched[position : position + len(part)].copy()
        is_new = np.zeros(len(part), np.bool_)
        if batch is not None:
            is_new = _place_of(part["name"].combine_chunks(), pa.chunked_array([batch.column("name")])) >= 0
        unsure = np.flatnonzero(~kept & ~is_new)
        if len(unsure):
            others = part.take(pa.array(unsure))
            kept[unsure] = (digest_cache.stats_of(root, others["name"]) == stats_in(others)).all(axis=1)
        tables = [part.filter(pa.array(kept & ~is_new)), *([] if batch is None else [pa.Table.from_batches([batch])])]
        yield pa.concat_tables(tables).sort_by("name")
