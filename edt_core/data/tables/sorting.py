"""Sorts rows that do not fit into memory: runs of sorted rows on the disk, merged where they overlap.

Rows that arrive in order, or folder by folder in any order, are written once more and compared hardly at all.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.tables.arrow_file import ROWS, MappedTable, Pages, map_file, mapped, scratch_file
from edt_core.store.errors import clear_space_errors

_SAMPLE = 256  # every so many rows of a run one that may become a bound between parts


class Sorter:
    """Collects tables and returns their rows in order of a binary column. `add` may be called in several threads.

    A context manager: at its end what it wrote is gone, except for the result.
    """

    def __init__(self, schema: pa.Schema, by: str, then: str | None = None) -> None:
        """`then`: the column that orders rows that are equal in `by`."""
        self._schema, self._by = schema, by
        self._order = [(name, "ascending") for name in (by, then) if name is not None]
        self._lock = threading.Lock()
        self._held: list[pa.Table] = []
        self._rows = 0
        self._file: BinaryIO | None = None  # few rows need none
        self._writer: pa.RecordBatchFileWriter | None = None
        self._bounds: list[tuple[bytes, bytes]] = []  # first and last of each run

    def __enter__(self) -> "Sorter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, table: pa.Table) -> None:
        """Rows in any order, at most about a batch of them. Raises UserError if the disk is full."""
        with self._lock:
            self._held.append(table)
            self._rows += len(table)
            if self._rows >= ROWS:
                self._write_run()

    def finish(self) -> MappedTable:
        """All rows, in order."""
        if self._file is None or self._writer is None:
            return mapped([self._run()], self._schema)
        if self._rows:
            self._write_run()
        self._writer.close()
        self._file.flush()
        return mapped(self._in_order(map_file(self._file)), self._schema)

    def _run(self) -> pa.Table:
        tables, self._held, self._rows = [self._schema.empty_table(), *self._held], [], 0
        return pa.concat_tables(tables).combine_chunks().sort_by(self._order)

    def _write_run(self) -> None:
        (run,) = self._run().combine_chunks().to_batches()
        names = run.column(self._by)
        self._bounds.append((names[0].as_py(), names[-1].as_py()))
        if self._file is None or self._writer is None:
            self._file = scratch_file()
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), self._schema)
        with clear_space_errors("the cache (set EDT_CACHE_DIR)"):
            self._writer.write_batch(run)

    def _in_order(self, spilled: MappedTable) -> Iterator[pa.Table]:
        runs = spilled.table.to_batches()
        cluster: list[pa.RecordBatch] = []
        last = b""
        for number in sorted(range(len(runs)), key=self._bounds.__getitem__):
            if cluster and self._bounds[number][0] > last:
                yield from _merged(cluster, self._order, spilled.pages)
                cluster = []
            cluster.append(runs[number])
            last = max(last, self._bounds[number][1])
        yield from _merged(cluster, self._order, spilled.pages)


def _merged(runs: list[pa.RecordBatch], order: list[tuple[str, str]], pages: Pages) -> Iterator[pa.Table]:
    """Sorted runs as one, in tables of about ROWS rows: all rows between two bounds are sorted together."""
    if len(runs) == 1:
        yield pa.Table.from_batches(runs)
        pages.release()
        return
    names = [run.column(order[0][0]) for run in runs]
    sample: list[bytes] = []
    for column in names:
        sample += [column[at].as_py() for at in range(0, len(column), _SAMPLE)]
        pages.release()
    sample.sort()
    starts = [0] * len(runs)
    for bound in [*sample[ROWS // _SAMPLE :: ROWS // _SAMPLE], None]:
        ends = [
            len(column) if bound is None else bisect_left(column, bound, start, key=lambda name: name.as_py())
            for column, start in zip(names, starts, strict=True)
        ]
        slices = [run.slice(start, end - start) for run, start, end in zip(runs, starts, ends, strict=True)]
        yield pa.Table.from_batches(slices).sort_by(order)
        pages.release()
        starts = ends


def is_ascending(rows: MappedTable, by: str) -> bool:
    """Whether each value of a binary column is above the one before: the rows are in order, and none repeats."""
    last: bytes | None = None
    for batch in rows.batches(by):
        values = batch.column(0)
        if (last is not None and values[0].as_py() <= last) or pc.any(pc.less_equal(values[1:], values[:-1])).as_py():
            return False
        last = values[-1].as_py()
    return True
