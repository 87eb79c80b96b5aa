"""A table in an Arrow file without a name: written batch by batch, then mapped.

The memory of a mapped table is that of its file: the system reads a page when it is used, and may drop it.
`Pages.release` drops those of this process at once, so that a pass over a table of any length holds a few batches.
"""

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from edt_core.store.cache import cache_folder
from edt_core.store.errors import clear_space_errors

ROWS = 1 << 16  # rows of a record batch; a table that has no more is kept in memory
_HELD = 2 * ROWS  # rows of a pass whose pages are in memory
_FOLDER = "tables"


class Pages:
    """The mapped file of a table; of none, which `release` leaves alone. A pickled one is of none: so is its table."""

    def __init__(self, mapping: mmap.mmap | None = None) -> None:
        self._mapping = mapping

    def release(self) -> None:
        """Take the pages out of this process's memory. Their content stays, and is read again when it is used."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple[type["Pages"], tuple[()]]:
        return Pages, ()


@dataclass(frozen=True)
class MappedTable:
    """A table, and the pages that its columns are in. Columns may be replaced by others in memory."""

    table: pa.Table
    pages: Pages = field(default_factory=Pages, compare=False, repr=False)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """The rows in order, all columns or these; only a few batches of a file are in memory at a time."""
        table = self.table.select(list(columns)) if columns else self.table
        held = 0
        for batch in table.to_batches():
            yield batch
            held += len(batch)
            if held >= _HELD:
                self.pages.release()
                pa.default_memory_pool().release_unused()
                held = 0
        self.pages.release()

    def take(self, indices: NDArray[np.int64]) -> "MappedTable":
        """The rows at ascending indices."""

        def parts() -> Iterator[pa.RecordBatch]:
            first = 0
            for batch in self.batches():
                low, high = np.searchsorted(indices, [first, first + len(batch)])
                if low < high:
                    yield batch.take(pa.array(indices[low:high] - first))
                first += len(batch)

        return mapped(parts(), self.table.schema)

    def with_column(self, index: int, name: str, parts: list[pa.Array]) -> "MappedTable":
        """With a further column, in memory, from its part of each batch."""
        return replace(self, table=self.table.add_column(index, name, pa.chunked_array(parts)))


def mapped(parts: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema) -> MappedTable:
    """Rows as a table: in memory if they are few, else in a file, written as the parts arrive.

    Raises UserError if the disk is full.
    """
    batches = in_batches(parts)
    first = list(islice(batches, 2))
    if sum(map(len, first)) <= ROWS:
        return MappedTable(pa.Table.from_batches(first, schema))
    with scratch_file() as file:
        writer = pa.ipc.new_file(pa.PythonFile(file, "w"), schema)
        with clear_space_errors("the cache (set EDT_CACHE_DIR)"):
            for batch in chain(first, batches):
                writer.write_batch(batch)
            writer.close()
            file.flush()
        return map_file(file)


def map_file(file: BinaryIO) -> MappedTable:
    """The table of a whole Arrow file, which may be closed then."""
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return MappedTable(pa.ipc.open_file(pa.py_buffer(mapping)).read_all(), Pages(mapping))


def in_batches(parts: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[pa.RecordBatch]:
    """The rows of the parts in batches of about ROWS."""
    held: list[pa.Table] = []
    rows = 0
    for part in parts:
        if len(part):
            held.append(part if isinstance(part, pa.Table) else pa.Table.from_batches([part]))
            rows += len(part)
        if rows >= ROWS:
            yield from _joined(held)
            held, rows = [], 0
    if held:
        yield from _joined(held)


def _joined(tables: list[pa.Table]) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = pa.concat_tables(tables).combine_chunks().to_batches()
    return batches


def scratch_file() -> BinaryIO:
    """A new file without a name, which ends with this process.

    It is in this node's cache, or where that cannot be written in the folder of temporary files.
    """
    folder = cache_folder() / _FOLDER
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    return tempfile.TemporaryFile()
