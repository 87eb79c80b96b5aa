"""The members of our own tar shards, written and found without an object for each of them.

Format: POSIX.1-2017 ustar, with pax headers for names that need them: a header block of 512 bytes, then the bytes of
the member filled up to whole blocks; two blocks of zeros at the end, filled up to records of 20 blocks. The bytes are
those of Python's tarfile, written in a fifth of the time: a shard that is mostly copied from an older one costs little
more than the copy.
"""

import mmap
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from edt_core.errors import UserError

_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_NAME, _SIZE, _SUM, _TYPE = slice(0, 100), slice(124, 135), slice(148, 156), 156
_LARGEST = 8**11 - 1  # bytes of a member that ustar can state
_MODE = 0o444


class MemberWriter:
    """Writes samples into an open file; `close` ends the archive. Owner, mode and time are the same for all members."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.written = file, 0

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Write `<key>.<extension>` for each {extension: bytes}, in order of extension."""
        for extension in sorted(members):
            data = members[extension]
            header, padding = _header(f"{key}.{extension}", len(data)), bytes(-len(data) % _BLOCK)
            self.file.write(b"".join((header, data, padding)))
            self.written += len(header) + len(data) + len(padding)

    def close(self) -> None:
        """Write the marks of the end."""
        end = self.written + 2 * _BLOCK
        self.file.write(bytes(2 * _BLOCK + -end % _RECORD))


def _header(name: str, size: int) -> bytes:
    if len(name) > 100 or not name.isascii() or size > _LARGEST:  # a header of pax goes before it
        return _info(name, size).tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    encoded, digits = name.encode(), b"%011o" % size
    blank, total = _blank()
    checksum = b"%06o\0 " % (total + sum(encoded) + sum(digits))
    before, between = blank[len(encoded) : _SIZE.start], blank[_SIZE.stop : _SUM.start]
    return b"".join((encoded, before, digits, between, checksum, blank[_SUM.stop :]))


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, _MODE
    return info


@cache
def _blank() -> tuple[bytes, int]:
    """A header without name, size and checksum, and what its bytes add to the checksum."""
    header = bytearray(_info("", 0).tobuf(tarfile.USTAR_FORMAT))
    header[_SIZE], header[_SUM] = bytes(11), b" " * 8
    return bytes(header), sum(header)


class TarRows(Sequence[dict[str, memoryview]]):
    """The samples of a tar that `MemberWriter` wrote, by their number: {extension: bytes}, views of the mapped file.

    `keys`: those of the samples, in order. A context manager. Raises UserError for an archive that has anything else
    in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.data = memoryview(self._map)
        self.keys: list[str] = []
        self._rows = list(self._located())

    def _located(self) -> Iterator[list[tuple[str, int, int]]]:
        """(extension, first byte, end) of the members of each sample."""
        row: list[tuple[str, int, int]] = []
        at, before, end = 0, None, len(self.data)
        while at + _BLOCK <= end and self.data[at]:
            header = self._map[at : at + _BLOCK]
            name = header[_NAME].partition(b"\0")[0].decode("utf-8", "surrogateescape")
            key, _, extension = name.rpartition(".")
            try:
                stop = at + _BLOCK + int(header[_SIZE], 8)
            except ValueError:
                stop = end + 1
            if header[_TYPE : _TYPE + 1] != b"0" or not key or stop > end:
                raise UserError(
                    f"{self.path} is not a shard of samples: {name[:80]!r} at byte {at}; run preprocess again"
                )
            if key != before:
                self.keys.append(key)
                if row:
                    yield row
                row = []
            row.append((extension, at + _BLOCK, stop))
            before, at = key, stop + -stop % _BLOCK
        if row:
            yield row

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, memoryview]:  # type: ignore[override]  # a slice of it is not wanted
        return {extension: self.data[start:stop] for extension, start, stop in self._rows[row]}

    def __enter__(self) -> "TarRows":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the map back; views of it that are left keep it until they are gone."""
        self.data.release()
        with suppress(BufferError):
            self._map.close()
