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

from edt_core.data.images import MAX_IMAGE_BYTES
from edt_core.data.sources.files import THREADS, as_text, open_file, remote, remote_path, shown
from edt_core.errors import UserError
from edt_core.store.errors import clear_remote_errors
from edt_core.store.folder import Folder

_HANDFUL = 4  # images a thread reads in a row: a switch of threads for each one costs as much as reading it
_HANDFUL_BYTES, _AHEAD_BYTES = 16 << 20, 128 << 20  # of images that are read in a row, and of all that wait
_ROWS_PER_READ = 1024  # rows of the listing that are Python objects at a time
_PARQUET_ROWS = 16  # images of a parquet file in memory at a time, of a large row group one
_LARGE_GROUP = 16 << 20  # bytes of the image column: a dictionary can repeat all of them in each row
_MAX_EXPANSION = 100  # bytes of the image column for each byte in the file; images hardly shrink
_MAX_ONE_ROW = MAX_IMAGE_BYTES + (1 << 20)  # bytes of a row group of one row: the image, and what its page takes
_MAX_EXPANDED = 256 << 20  # bytes that a row group may have whatever its expansion
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

    def image(self, data: bytes | None) -> RawImage:
        """The image of these bytes; None for a row that holds none."""
        if data is None:
            return RawImage(as_text(self.name), self.label, None, "ValueError: the row holds no image")
        return self.too_large(len(data)) if len(data) > MAX_IMAGE_BYTES else self._whole(data)

    def _whole(self, data: bytes) -> RawImage:
        return RawImage(as_text(self.name), self.label, data)

    def too_large(self, size: int) -> RawImage:
        reason = f"ValueError: {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} that one image may have"
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
    work: Callable[[Item], Made],
    items: Iterable[Item],
    handful: int = 1,
    size: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Made]:
    """`work` of each item, in order, made ahead by eight threads that take a `handful` of items at a time.

    `size` is the bytes that an item takes: items of more than 128 MiB together are not made ahead.
    """

    def several(batch: list[Item]) -> list[Made]:
        return [work(item) for item in batch]

    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[tuple[Future[list[Made]], int]] = deque()
        waiting = 0
        try:
            for batch, taken in _handfuls(items, handful, size):
                while pending and (len(pending) >= THREADS or waiting + taken > _AHEAD_BYTES):
                    yield from pending[0][0].result()
                    waiting -= pending.popleft()[1]
                pending.append((pool.submit(several, batch), taken))
                waiting += taken
            while pending:
                yield from pending.popleft()[0].result()
        finally:  # the reader may stop early
            for future, _ in pending:
                future.cancel()


def _handfuls(items: Iterable[Item], most: int, size: Callable[[Item], int]) -> Iterator[tuple[list[Item], int]]:
    """Items in lists of at most `most`, which end where they take 16 MiB, and the bytes that each list takes."""
    batch: list[Item] = []
    taken = 0
    for item in items:
        more = size(item)
        if batch and (len(batch) == most or taken + more > _HANDFUL_BYTES):
            yield batch, taken
            batch, taken = [], 0
        batch.append(item)
        taken += more
    if batch:
        yield batch, taken


def read_files(root: Folder, table: pa.Table, ranges: bool, made: Callable[[RawImage], Made]) -> Iterator[Made]:
    """`made` of each image, in order; it runs in the reading threads. `ranges`: images are parts of larger files.

    What has more than MAX_IMAGE_BYTES is not read. Raises UserError for a file whose size has changed since it was
    listed, and OSError for a fault of the disk or the network.
    """
    read = _disk_reader(root) if root.local is not None else _remote_reader(root)

    def image(row: Row) -> Made:
        if row.size > MAX_IMAGE_BYTES:
            return made(row.too_large(row.size))
        with clear_remote_errors(shown(root.uri)) if root.local is None else nullcontext():
            try:
                data = read(row, ranges)
            except (PermissionError, FileNotFoundError) as error:
                return made(row.unreadable(error))
        return made(row.image(data))

    return ahead(image, rows(table), _HANDFUL, lambda row: row.size if row.size <= MAX_IMAGE_BYTES else 0)


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
            listed = rows(part.slice(low, high - low))
            size = _group_bytes(parquet, group, column, part)
            if stop - start == 1 and size > _MAX_ONE_ROW:
                yield next(listed).too_large(size)
            else:
                at_once = _PARQUET_ROWS if size <= _LARGE_GROUP else 1
                data = _group_values(parquet, group, column, wanted[low:high] - start, at_once)
                yield from (row.image(value) for row, value in zip(listed, data, strict=True))
        start = stop
    if wanted[-1] >= start:
        raise _changed(next(rows(part)), f"{start} rows instead of {wanted[-1] + 1} or more")


def _group_bytes(parquet: Any, group: int, column: str, part: pa.Table) -> int:
    """Bytes of the image column in a row group. Raises UserError for a decompression bomb."""
    about = parquet.metadata.row_group(group)
    chunk = next(c for c in map(about.column, range(about.num_columns)) if c.path_in_schema == column)
    size, stored = int(chunk.total_uncompressed_size), int(chunk.total_compressed_size)
    if size > _MAX_EXPANDED and size > _MAX_EXPANSION * stored:
        raise UserError(
            f"{as_text(next(rows(part)).file)}: the images of row group {group} would be {size:,} bytes, made of "
            f"{stored:,} in the file: a decompression bomb; remove the file, or write it again without compression"
        )
    return size


def _group_values(parquet: Any, group: int, column: str, wanted: np.ndarray, at_once: int) -> Iterator[bytes | None]:
    """Values of a binary column at these rows of a row group, `at_once` rows in memory."""
    import pyarrow.compute as pc

    name, _, leaf = column.partition(".")
    start = 0
    batches = parquet.iter_batches(at_once, row_groups=[group], columns=[column], use_threads=False)
    for batch in batches:
        low, high = np.searchsorted(wanted, [start, start + len(batch)])
        if low < high:
            values = batch.column(name)
            values = pc.struct_field(values, leaf) if leaf else values
            yield from values.take(pa.array(wanted[low:high] - start)).to_pylist()
        start += len(batch)
        if high == len(wanted):
            return
