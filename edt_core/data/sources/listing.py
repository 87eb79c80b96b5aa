"""Every image of a source in a fixed order, and the hash that identifies the images."""

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from edt_core.data.sources.digest_cache import Listed, local_digests
from edt_core.data.sources.file_digests import file_digests
from edt_core.data.sources.files import as_text
from edt_core.data.sources.reading import RawImage, Result, Row, read_files, read_parquet, rows
from edt_core.data.sources.walk import STAT
from edt_core.data.tables import ROWS, MappedTable, Pages, bytes_column, is_ascending
from edt_core.progress import Progress, Silent
from edt_core.store.folder import Folder

UNREADABLE = hashlib.sha256(b"unreadable").digest()  # the digest of every image that cannot be read
_FORMAT = b"edt-source-1"
_DIGEST = hashlib.sha256().digest_size
_UPDATE_EVERY = 256
_SILENT = Silent()

Access = Literal["file", "range", "parquet"]


@dataclass(frozen=True)
class Listing:
    """Every image of a labelled source. Picklable; a slice is small enough to send to a worker.

    `table` has one row per image, in order; of very many files it is mapped from a file, whose pages are `pages`:
        name     binary     unique; file name relative to `root`, member of a tar, or `<parquet file>#<row>`
        label    int32      index into `classes`
        size     int64      bytes of the encoded image; 0 for parquet files, whose image sizes are unknown until read
        file     dictionary of binary: the tar or parquet file; absent with access 'file', where the name is the file
        offset   int64      first byte of the image in its tar, or row of the parquet file; absent with access 'file'
        version  string (a dictionary if `file` is one): the store's token for the content of the file; remote only
        mtime_ns, ctime_ns, inode, device  uint64: those of the file when it was listed; local, with access 'file' only
    """

    root: Folder
    classes: tuple[str, ...]  # in order of class index
    table: pa.Table
    access: Access
    left_out: Mapping[str, int] = field(default_factory=dict)  # files of the source that are not images, by extension
    skipped: Mapping[str, int] = field(default_factory=dict)  # images that have no class, by the reason
    pages: Pages = field(default_factory=Pages, compare=False, repr=False)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def rows(self) -> MappedTable:
        """The table for passes over all rows, which hold a few batches of a mapped one."""
        return MappedTable(self.table, self.pages)

    def with_rows(self, rows: MappedTable) -> "Listing":
        """The same source with other rows."""
        return replace(self, table=rows.table, pages=rows.pages)

    @property
    def class_counts(self) -> np.ndarray:
        """Images of each class [K], int64: 0 for a class that the source names but has no image of."""
        return np.bincount(np.asarray(self.table["label"]), minlength=len(self.classes))

    @property
    def remote(self) -> bool:
        """Whether the source is in a remote store; its identity then comes from the store's version tokens."""
        return self.root.local is None

    def slice(self, start: int, stop: int) -> "Listing":
        """Images [start, stop), in separate buffers: pickling an Arrow slice would send the whole listing.

        It is for reading, so it does not have the files' times and inodes.
        """
        start, stop = max(start, 0), min(max(stop, start, 0), len(self))
        part = self.table.slice(start, stop - start)  # `take` on the whole table would join its chunks each time
        part = part.drop_columns([name for name in STAT if name in part.schema.names])
        return replace(self, table=part, left_out={}, skipped={}, pages=Pages()).take(np.arange(stop - start))

    def take(self, indices: Sequence[int] | np.ndarray) -> "Listing":
        """The images at these indices, in this order."""
        places = np.asarray(indices, dtype=np.int64)
        is_ascending = bool((places[1:] >= places[:-1]).all())
        order = np.argsort(places, kind="stable")
        rows = self.rows.take(places if is_ascending else places[order])
        if is_ascending and len(places) > ROWS and self.access == "file":
            return self.with_rows(rows)
        table = rows.table if is_ascending else rows.table.take(pa.array(np.argsort(order, kind="stable")))
        return replace(self, table=encode_repeats(decode_repeats(table)).combine_chunks(), pages=Pages())

    def images(self) -> Iterator[RawImage]:
        """The encoded images in order, read ahead by eight threads (parquet: streamed by one).

        An image without read permission, or that has disappeared, carries its error. Raises OSError for faults of the
        disk or the network, and UserError for a file that has changed since it was listed.
        """
        return self.convert(lambda image: image)

    def convert(self, work: Callable[[RawImage], Result]) -> Iterator[Result]:
        """`work(image)` of each image, in order, as `images`; it runs in the threads that read."""
        if self.access == "parquet":
            return read_parquet(self.root, self.table, work)
        return read_files(self.root, self.table, self.access == "range", work)


def decode_repeats(table: pa.Table) -> pa.Table:
    """Dictionary columns as plain ones."""
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(index, column.name, table[column.name].cast(column.type.value_type))
    return table


def encode_repeats(table: pa.Table) -> pa.Table:
    """Encode the columns that repeat one value for all images of an archive as dictionaries."""
    if "file" in table.schema.names:
        for name in {"file", "version"} & set(table.schema.names):
            encoded = table[name].combine_chunks().dictionary_encode()
            table = table.set_column(table.schema.get_field_index(name), name, encoded)
    return table


def archive_table(
    file: bytes,
    version: str | None,
    names: Sequence[bytes] | pa.Array,
    labels: Sequence[int] | np.ndarray,
    sizes: Sequence[int] | np.ndarray,
    offsets: Sequence[int] | np.ndarray,
) -> pa.Table:
    """The rows of a listing for the images of one tar or parquet file."""
    count = len(names)
    columns = {
        "name": pa.array(names, pa.binary()) if not isinstance(names, pa.Array) else names,
        "label": pa.array(labels, pa.int32()),
        "size": pa.array(sizes, pa.int64()),
        "file": pa.repeat(pa.scalar(file, pa.binary()), count),
        "offset": pa.array(offsets, pa.int64()),
    }
    if version is not None:
        columns["version"] = pa.repeat(pa.scalar(version, pa.string()), count)
    return pa.table(columns)


def combine_identity(
    classes: Sequence[str],
    names: Iterable[bytes | str],
    labels: Iterable[int],
    digests: bytes | Iterable[bytes],
) -> str:
    """Hex sha256 over the class names and, in order, each image's name, label and 32-byte digest.

    `names` are those of the table, or of `RawImage.name`; `digests` are separate, or joined into one bytes object.
    """
    total = _identity_of_classes(classes)
    if isinstance(digests, bytes | bytearray):
        joined = memoryview(digests)
        digests = (bytes(joined[at : at + _DIGEST]) for at in range(0, len(joined), _DIGEST))
    for image, label, digest in zip(names, labels, digests, strict=True):
        assert len(digest) == _DIGEST
        total.update(_text(image) + struct.pack("<q", label) + digest)
    return total.hexdigest()


def _identity_of_classes(classes: Sequence[str]) -> "hashlib._Hash":
    total = hashlib.sha256(_FORMAT + struct.pack("<q", len(classes)))
    for name in classes:
        total.update(_text(name))
    return total


def _text(name: bytes | str) -> bytes:
    encoded = (as_text(name) if isinstance(name, bytes) else name).encode("utf-8", "backslashreplace")
    return struct.pack("<q", len(encoded)) + encoded


def image_digest(image: RawImage) -> bytes:
    """sha256 of the image's bytes, or UNREADABLE: the digest that `combine_identity` takes for a local source."""
    return UNREADABLE if image.data is None else hashlib.sha256(image.data).digest()


def _version_digest(row: Row) -> bytes:
    return hashlib.sha256(f"{row.size}\0{row.version}".encode()).digest()


def image_versions(table: pa.Table) -> NDArray[np.uint8]:
    """A digest of each remote image's name, size and version token, uint8 [N, 32]: equal while it is not written to."""
    return _as_rows((hashlib.sha256(row.name + b"\0" + _version_digest(row)).digest() for row in rows(table)), table)


def _as_rows(digests: Iterator[bytes], table: pa.Table) -> NDArray[np.uint8]:
    """Digests of the rows of a table, uint8 [N, 32]."""
    return np.fromiter(digests, np.dtype((np.void, _DIGEST)), len(table)).view(np.uint8).reshape(-1, _DIGEST)


def source_identity(listing: Listing, progress: Progress = _SILENT, again: bool = False) -> str:
    """What the images are, as hex sha256: `combine_identity` of the listing and of `source_digests`."""
    return listing_identity(listing, source_digests(listing, progress, again))


def listing_identity(listing: Listing, digests: NDArray[np.uint8] | Callable[[int, int], NDArray[np.uint8]]) -> str:
    """The identity of a listing whose images have these digests, uint8 [N, 32], or a function that reads a range."""
    read = digests if callable(digests) else lambda first, stop: digests[first:stop]
    total = _identity_of_classes(listing.classes)
    first = 0
    for batch in listing.rows.batches("name", "label"):
        total.update(_identity_of_rows(batch, read(first, first + len(batch))))
        first += len(batch)
    return total.hexdigest()


def _identity_of_rows(batch: pa.RecordBatch, digests: NDArray[np.uint8]) -> pa.Buffer | bytes:
    """What `combine_identity` hashes for these rows."""
    names, labels = batch.column("name"), batch.column("label")
    try:
        names.cast(pa.string())
    except pa.ArrowInvalid:  # a name that is not UTF-8 is hashed as its text
        names = pa.array([as_text(name).encode() for name in names.to_pylist()], pa.binary())
    lengths = pc.binary_length(names).cast(pa.int64())
    fixed = [np.asarray(lengths), np.asarray(labels.cast(pa.int64())), digests]
    length, label, digest = (bytes_column(values).cast(pa.binary()) for values in fixed)
    parts = [length, names, label, digest]
    joined = pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.binary()))
    _, offsets, data = joined.buffers()
    ends = np.frombuffer(offsets, np.int32)[joined.offset :]
    return data[int(ends[0]) : int(ends[len(joined)])]


def source_digests(listing: Listing, progress: Progress = _SILENT, again: bool = False) -> NDArray[np.uint8]:
    """The identity of each image's content, uint8 [N, 32].

    Of a local source the sha256 of its bytes, or UNREADABLE: a file is read unless it is known and was untouched when
    it was listed, or always with `again`. Of a remote source nothing is read: the digest is that of the image's size
    and of the store's version token (an ETag) of the file that holds it.
    """
    if listing.root.local is None:
        return _as_rows(map(_version_digest, rows(listing.table)), listing.table)

    def read(places: NDArray[np.int64] | None) -> Iterator[bytes]:
        part = listing if places is None or len(places) == len(listing) else listing.take(places)
        return _reporting(part.convert(image_digest), len(part), progress, part.pages)

    root, warn = listing.root.local, progress.warn
    if listing.access == "file":
        return file_digests(root, listing.rows, read, UNREADABLE, again, warn)
    return local_digests(root, listing.access, _files_of(listing), read, UNREADABLE, again, warn)


def _files_of(listing: Listing) -> Listed:
    """The archives of a listing, and which of them each image is in."""
    table = listing.table
    column = table["file"].combine_chunks().dictionary_encode()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    names = pa.chunked_array([column.dictionary], pa.binary())
    return Listed(names, np.asarray(column.indices).astype(np.int64), np.asarray(table["offset"]), None)


def _reporting(digests: Iterator[bytes], total: int, progress: Progress, pages: Pages) -> Iterator[bytes]:
    for done, digest in enumerate(digests, 1):
        yield digest
        if done % ROWS == 0:
            pages.release()
        if done % _UPDATE_EVERY == 0 or done == total:
            progress.update(done, total, "images digested")


def duplicates(listing: Listing) -> list[bytes]:
    """Names that occur more than once, sorted. Takes 16 bytes an image, and nothing if they are in order."""
    if is_ascending(listing.rows, "name"):
        return []
    hashes = np.empty(len(listing), np.int64)
    first = 0
    for batch in listing.rows.batches("name"):
        hashes[first : first + len(batch)] = [hash(name) for name in batch.column(0).to_pylist()]
        first += len(batch)
    in_order = np.sort(hashes)
    repeated = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    if not len(repeated):
        return []
    names = listing.table["name"].filter(pa.array(np.isin(hashes, repeated))).to_pylist()
    return sorted(name for name, number in Counter(names).items() if number > 1)
