"""Bytes of listed images, in order and read ahead: a remote store must not cost one round trip an image."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from edt_core.data.prefetch import in_batches
from edt_core.data.sources.files import THREADS, as_text, open_file, remote, remote_path, shown
from edt_core.errors import UserError
from edt_core.storage import Folder
from edt_core.store_errors import clear_remote_errors

_HANDFUL = 4  # images a thread reads in a row: a switch of threads for each one costs as much as reading it
_ROWS_PER_READ = 1024  # rows of the listing that are Python objects at a time
_PARQUET_ROWS = 16  # images of a parquet file in memory at a time
_LOCAL_BUFFER, _REMOTE_BUFFER = 1 << 20, 8 << 20  # bytes of a parquet file that are asked for at once
_REASONS = {PermissionError: "Permission denied", FileNotFoundError: "No such file or directory"}

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class RawImage:
    """An encoded image as it lies in the source, or (`data` None) why it could not be read."""

    name: str
    label: int
    data: bytes | None
    error: str | None = None


class Row(NamedTuple):
    """A row of a listing. With access 'file' the name is the file and the offset 0."""

    name: bytes
    label: int
    size: int
    version: str | None
    file: bytes
    offset: int

    def unreadable(self, error: OSError) -> RawImage:
        """The reason without the path: records of it travel further than the disk's layout should."""
        reason = next(text for kind, text in _REASONS.items() if isinstance(error, kind))
        return RawImage(as_text(self.name), self.label, None, f"{type(error).__name__}: {reason}")


def rows(table: pa.Table) -> Iterator[Row]:
    """The rows of a listing's table as Python values, a thousand at a time."""
    for batch in table.to_batches(max_chunksize=_ROWS_PER_READ):
        columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
        blank: list[Any] = [None] * len(batch)
        yield from map(
            Row,
            columns["name"],
            columns["label"],
            columns["size"],
            columns.get("version", blank),
            columns.get("file", columns["name"]),
            columns.get("offset", [0] * len(batch)),
        )


def ahead(work: Callable[[Item], Made], items: Iterable[Item], handful: int = 1) -> Iterator[Made]:
    """`work` of each item, in order, made ahead by eight threads that take a `handful` of items at a time."""

    def several(batch: tuple[Item, ...]) -> list[Made]:
        return [work(item) for item in batch]

    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[Future[list[Made]]] = deque()
        try:
            for batch in in_batches(items, handful):
                pending.append(pool.submit(several, batch))
                if len(pending) >= THREADS:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:  # the reader may stop early
            for future in pending:
                future.cancel()


def read_files(root: Folder, table: pa.Table, ranges: bool, made: Callable[[RawImage], Made]) -> Iterator[Made]:
    """`made` of each image, in order; it runs in the reading threads. `ranges`: images are parts of larger files.

    Raises UserError for a file that has become shorter, and OSError for a fault of the disk or the network.
    """
    read = _disk_reader(root) if root.local is not None else _remote_reader(root)

    def image(row: Row) -> Made:
        with clear_remote_errors(shown(root.uri)) if root.local is None else nullcontext():
            try:
                data = read(row, ranges)
            except (PermissionError, FileNotFoundError) as error:
                return made(row.unreadable(error))
        return made(RawImage(as_text(row.name), row.label, data))

    return ahead(image, rows(table), _HANDFUL)


def _disk_reader(root: Folder) -> Callable[[Row, bool], bytes]:
    base = os.fsencode(str(root.local))

    def read(row: Row, ranges: bool) -> bytes:
        with open(os.path.join(base, row.file), "rb") as file:
            if not ranges:
                return file.read()
            file.seek(row.offset)
            return _whole(file.read(row.size), row)

    return read


def _remote_reader(root: Folder) -> Callable[[Row, bool], bytes]:
    fs, base = remote(root)

    def read(row: Row, ranges: bool) -> bytes:
        path = remote_path(base, row.file)
        if ranges:
            return _whole(fs.cat_file(path, start=row.offset, end=row.offset + row.size), row) if row.size else b""
        # A range spares s3fs the question for the size; one byte more than was listed shows that the file has grown.
        return _whole(fs.cat_file(path, start=0, end=row.size + 1) if row.size else fs.cat_file(path), row)

    return read


def _whole(data: bytes, row: Row) -> bytes:
    if len(data) != row.size:
        raise _changed(row, f"{len(data)} bytes instead of {row.size}")
    return bytes(data)


def _changed(row: Row, what: str) -> UserError:
    return UserError(
        f"{as_text(row.file)} changed after it was listed ({as_text(row.name)}: {what}); "
        "run again once nothing writes to the source"
    )


def image_column(schema: pa.Schema) -> str | None:
    """Path of the leaf that holds the encoded images: `image.bytes` as Hugging Face writes it, or a binary column."""
    for name in ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes"):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return f"{name}.bytes"
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return name
    return None


def read_parquet(root: Folder, table: pa.Table, made: Callable[[RawImage], Made]) -> Iterator[Made]:
    """`made` of each image, in order. Each needed row group is read once, page by page, and only the image column.

    Raises UserError for a file that has fewer rows now.
    """
    if not len(table):
        return
    codes = np.asarray(table["file"].combine_chunks().indices)
    cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    for start, stop in pairwise(cuts):
        part = table.slice(start, stop - start)
        first = next(rows(part))
        try:
            file = open_file(root, first.file)
        except (PermissionError, FileNotFoundError) as error:
            yield from (made(row.unreadable(error)) for row in rows(part))
            continue
        with file:
            yield from map(made, _whole_pages(_parquet_images(file, root.local is None, part), first))


def _whole_pages(images: Iterator[RawImage], first: Row) -> Iterator[RawImage]:
    try:
        yield from images
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk or the store; pyarrow's own have no number
            raise
        raise UserError(f"{as_text(first.file)} is damaged ({error}); copy or download it again") from error


def _parquet_images(file: Any, is_remote: bool, part: pa.Table) -> Iterator[RawImage]:
    """The listed rows of one file; `part` is in order of row."""
    import pyarrow.parquet as pq

    # Without pre_buffer: it keeps every row group that it has read.
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_REMOTE_BUFFER if is_remote else _LOCAL_BUFFER)
    column = image_column(parquet.schema_arrow)
    if column is None:
        raise _changed(next(rows(part)), "no image column is left")
    wanted = np.asarray(part["offset"])
    start = 0
    for group in range(parquet.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        low, high = np.searchsorted(wanted, [start, stop])
        if low < high:
            data = _group_values(parquet, group, column, wanted[low:high] - start)
            for row, value in zip(rows(part.slice(low, high - low)), data, strict=True):
                error = None if value is not None else "ValueError: the row holds no image"
                yield RawImage(as_text(row.name), row.label, value, error)
        start = stop
    if wanted[-1] >= start:
        raise _changed(next(rows(part)), f"{start} rows instead of {wanted[-1] + 1} or more")


def _group_values(parquet: Any, group: int, column: str, wanted: np.ndarray) -> Iterator[bytes | None]:
    """Values of a binary column at these rows of a row group."""
    import pyarrow.compute as pc

    name, _, leaf = column.partition(".")
    start = 0
    batches = parquet.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[column], use_threads=False)
    for batch in batches:
        low, high = np.searchsorted(wanted, [start, start + len(batch)])
        if low < high:
            values = batch.column(name)
            values = pc.struct_field(values, leaf) if leaf else values
            yield from values.take(pa.array(wanted[low:high] - start)).to_pylist()
        start += len(batch)
        if high == len(wanted):
            return
