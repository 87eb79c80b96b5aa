"""Reads the bytes of listed images in order, ahead of use: a remote store must not cost one round trip per image."""

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

from edt_core.data.images import MAX_IMAGE_BYTES
from edt_core.data.sources.files import THREADS, as_text, open_file, remote, remote_path, shown
from edt_core.errors import UserError
from edt_core.store.errors import clear_remote_errors
from edt_core.store.folder import Folder

_BATCH_IMAGES = 4  # images a thread reads in a row: a thread switch per image costs as much as reading it
_BATCH_BYTES, _AHEAD_BYTES = 16 << 20, 128 << 20  # bytes of one such batch, and of all batches read ahead
_ROWS_PER_READ = 1024  # rows of the listing that are Python objects at a time
_PARQUET_ROWS = 16  # images of a parquet file in memory at a time; only one if the row group is large
_LARGE_GROUP = 16 << 20  # bytes of the image column: a dictionary can repeat all of them in each row
_MAX_EXPANSION = 100  # bytes of the image column per byte in the file; images hardly compress
_MAX_ONE_ROW = MAX_IMAGE_BYTES + (1 << 20)  # bytes of a row group of one row: the image and its page
_MAX_EXPANDED = 256 << 20  # bytes that a row group may have at any expansion
_LOCAL_BUFFER, _REMOTE_BUFFER = 1 << 20, 8 << 20  # bytes of a parquet file per read
_REASONS = {PermissionError: "Permission denied", FileNotFoundError: "No such file or directory"}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RawImage:
    """An encoded image of the source, or, with `data` None, the reason why it could not be read."""

    name: str
    label: int
    data: bytes | None
    error: str | None = None

    def attempt(self, work: Callable[[bytes], Result]) -> tuple[Result | None, str]:
        """(`work` on the bytes, ""), or None with the reason why the image cannot be used."""
        if self.data is None:
            return None, self.error or "cannot be read"
        try:
            return work(self.data), ""
        except MemoryError:  # the machine's fault, not the image's
            raise
        except Exception as error:  # Pillow's decoders raise errors of any class on malformed data
            return None, f"{type(error).__name__}: {error}"


class Row(NamedTuple):
    """A row of a listing. With access 'file' the name is the file and the offset 0."""

    name: bytes
    label: int
    size: int
    version: str | None
    file: bytes
    offset: int

    def unreadable(self, error: OSError) -> RawImage:
        """The error without the path, because records of it are shared more widely than the disk's layout should be."""
        reason = next(text for kind, text in _REASONS.items() if isinstance(error, kind))
        return RawImage(as_text(self.name), self.label, None, f"{type(error).__name__}: {reason}")

    def image(self, data: bytes | None) -> RawImage:
        """The image with these bytes; None for a row without an image."""
        if data is None:
            return RawImage(as_text(self.name), self.label, None, "ValueError: the row contains no image")
        return self.too_large(len(data)) if len(data) > MAX_IMAGE_BYTES else self._whole(data)

    def _whole(self, data: bytes) -> RawImage:
        return RawImage(as_text(self.name), self.label, data)

    def too_large(self, size: int) -> RawImage:
        reason = f"ValueError: {size:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,} for one image"
        return RawImage(as_text(self.name), self.label, None, reason)


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


def ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    batch_size: int = 1,
    size: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Result]:
    """`work(item)` of each item, in order, computed ahead by eight threads that take `batch_size` items at a time.

    `size` returns the bytes of an item: at most 128 MiB of items are computed ahead.
    """

    def results(batch: list[Item]) -> list[Result]:
        return [work(item) for item in batch]

    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[tuple[Future[list[Result]], int]] = deque()
        pending_bytes = 0
        try:
            for batch, batch_bytes in _batches(items, batch_size, size):
                while pending and (len(pending) >= THREADS or pending_bytes + batch_bytes > _AHEAD_BYTES):
                    yield from pending[0][0].result()
                    pending_bytes -= pending.popleft()[1]
                pending.append((pool.submit(results, batch), batch_bytes))
                pending_bytes += batch_bytes
            while pending:
                yield from pending.popleft()[0].result()
        finally:  # the consumer may stop early
            for future, _ in pending:
                future.cancel()


def _batches(items: Iterable[Item], batch_size: int, size: Callable[[Item], int]) -> Iterator[tuple[list[Item], int]]:
    """Items in batches of at most `batch_size` and 16 MiB, with the bytes of each batch."""
    batch: list[Item] = []
    batch_bytes = 0
    for item in items:
        item_bytes = size(item)
        if batch and (len(batch) == batch_size or batch_bytes + item_bytes > _BATCH_BYTES):
            yield batch, batch_bytes
            batch, batch_bytes = [], 0
        batch.append(item)
        batch_bytes += item_bytes
    if batch:
        yield batch, batch_bytes


def read_files(root: Folder, table: pa.Table, ranges: bool, convert: Callable[[RawImage], Result]) -> Iterator[Result]:
    """`convert(image)` of each image, in order; it runs in the reading threads. `ranges`: images are parts of files.

    Images of more than MAX_IMAGE_BYTES are not read. Raises UserError for a file whose size has changed since it was
    listed, and OSError for a fault of the disk or the network.
    """
    read = _disk_reader(root) if root.local is not None else _remote_reader(root)

    def image(row: Row) -> Result:
        if row.size > MAX_IMAGE_BYTES:
            return convert(row.too_large(row.size))
        with clear_remote_errors(shown(root.uri)) if root.local is None else nullcontext():
            try:
                data = read(row, ranges)
            except (PermissionError, FileNotFoundError) as error:
                return convert(row.unreadable(error))
        return convert(row.image(data))

    return ahead(image, rows(table), _BATCH_IMAGES, lambda row: row.size if row.size <= MAX_IMAGE_BYTES else 0)


def _disk_reader(root: Folder) -> Callable[[Row, bool], bytes]:
    base = os.fsencode(str(root.local))

    def read(row: Row, ranges: bool) -> bytes:
        with open(os.path.join(base, row.file), "rb") as file:
            if not ranges:
                return _whole(file.read(row.size + 1), row)  # one byte more shows that the file has grown
            file.seek(row.offset)
            return _whole(file.read(row.size), row)

    return read


def _remote_reader(root: Folder) -> Callable[[Row, bool], bytes]:
    fs, base = remote(root)

    def read(row: Row, ranges: bool) -> bytes:
        path = remote_path(base, row.file)
        if ranges:
            return _whole(fs.cat_file(path, start=row.offset, end=row.offset + row.size), row) if row.size else b""
        # With a range, s3fs does not request the size first; one byte beyond the listed size shows growth.
        return _whole(fs.cat_file(path, start=0, end=row.size + 1) if row.size else fs.cat_file(path), row)

    return read


def _whole(data: bytes, row: Row) -> bytes:
    if len(data) != row.size:
        raise _changed(row, f"{len(data)} bytes instead of {row.size}")
    return bytes(data)


def _changed(row: Row, what: str) -> UserError:
    return UserError(
        f"{as_text(row.file)} changed after it was listed ({as_text(row.name)}: {what}); "
        "rerun when nothing writes to the source"
    )


def image_column(schema: pa.Schema) -> str | None:
    """Path of the column of encoded images: `image.bytes` as Hugging Face writes it, or a binary column."""
    for name in ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes"):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return f"{name}.bytes"
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return name
    return None


def read_parquet(root: Folder, table: pa.Table, convert: Callable[[RawImage], Result]) -> Iterator[Result]:
    """`convert(image)` of each image, in order. Of each needed row group the image column is read once, page by page.

    Raises UserError for a file that has fewer rows than when it was listed.
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
            yield from (convert(row.unreadable(error)) for row in rows(part))
            continue
        with file:
            yield from map(convert, _whole_pages(_parquet_images(file, root.local is None, part), first))


def _whole_pages(images: Iterator[RawImage], first: Row) -> Iterator[RawImage]:
    try:
        yield from images
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # from the disk or the store; pyarrow's have no errno
            raise
        raise UserError(f"{as_text(first.file)} is damaged ({error}); copy or download it again") from error


def _parquet_images(file: Any, is_remote: bool, part: pa.Table) -> Iterator[RawImage]:
    """The listed rows of one file; `part` is in order of row."""
    import pyarrow.parquet as pq

    # Without pre_buffer, which keeps every row group that was read in memory.
    parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_REMOTE_BUFFER if is_remote else _LOCAL_BUFFER)
    column = image_column(parquet.schema_arrow)
    if column is None:
        raise _changed(next(rows(part)), "the image column is gone")
    positions = np.asarray(part["offset"])
    start = 0
    for group in range(parquet.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        low, high = np.searchsorted(positions, [start, stop])
        if low < high:
            group_rows = rows(part.slice(low, high - low))
            size = _group_bytes(parquet, group, column, part)
            if stop - start == 1 and size > _MAX_ONE_ROW:
                yield next(group_rows).too_large(size)
            else:
                batch_size = _PARQUET_ROWS if size <= _LARGE_GROUP else 1
                data = _group_values(parquet, group, column, positions[low:high] - start, batch_size)
                yield from (row.image(value) for row, value in zip(group_rows, data, strict=True))
        start = stop
    if positions[-1] >= start:
        raise _changed(next(rows(part)), f"{start} rows instead of {positions[-1] + 1} or more")


def _group_bytes(parquet: Any, group: int, column: str, part: pa.Table) -> int:
    """Bytes of the image column in a row group. Raises UserError for a decompression bomb."""
    metadata = parquet.metadata.row_group(group)
    chunk = next(c for c in map(metadata.column, range(metadata.num_columns)) if c.path_in_schema == column)
    size, stored = int(chunk.total_uncompressed_size), int(chunk.total_compressed_size)
    if size > _MAX_EXPANDED and size > _MAX_EXPANSION * stored:
        raise UserError(
            f"{as_text(next(rows(part)).file)}: the images of row group {group} would expand to {size:,} bytes from "
            f"{stored:,} in the file: a decompression bomb; remove the file, or write it again without compression"
        )
    return size


def _group_values(
    parquet: Any, group: int, column: str, positions: np.ndarray, batch_size: int
) -> Iterator[bytes | None]:
    """Values of a binary column at these rows of a row group, with `batch_size` rows in memory."""
    import pyarrow.compute as pc

    name, _, leaf = column.partition(".")
    start = 0
    batches = parquet.iter_batches(batch_size, row_groups=[group], columns=[column], use_threads=False)
    for batch in batches:
        low, high = np.searchsorted(positions, [start, start + len(batch)])
        if low < high:
            values = batch.column(name)
            values = pc.struct_field(values, leaf) if leaf else values
            yield from values.take(pa.array(positions[low:high] - start)).to_pylist()
        start += len(batch)
        if high == len(positions):
            return
