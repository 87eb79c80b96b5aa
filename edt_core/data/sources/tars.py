"""Lists the members of a tar without extracting it, and checks that the archive is complete.

Format: POSIX.1-2017 pax, ustar interchange format, section "ustar Interchange Format": 512-byte blocks, two of zeros
at the end. Python's tarfile stops silently at a damaged header, as if it were the end.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from edt_core.data.sources.files import is_image, shown
from edt_core.errors import UserError

BLOCK_SIZE = 4 << 20  # bytes per read of a remote tar: images are smaller, so listing its headers reads all of it
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLOCK = 512
_MAX_HEADER = 1 << 20  # bytes of a pax header or a long name, which tarfile reads into memory
_READ_WHOLE = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class Member(NamedTuple):
    """A regular file in a tar: its bytes are [offset, offset + size) of the file that contains the tar."""

    name: bytes
    offset: int
    size: int


class _Info(tarfile.TarInfo):
    """A member whose extended header is small."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _READ_WHOLE and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        info: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]  # documented in tarfile's source
        return info


def refuse_compressed(name: str) -> None:
    """Raise UserError for the name of a compressed tar: its members cannot be read separately."""
    if name.lower().endswith(COMPRESSED):
        raise _compressed(shown(name))


def _compressed(where: str) -> UserError:
    return UserError(f"{where} is compressed; decompress it first, for example with gunzip (compression saves nothing)")


def members(file: BinaryIO, where: str, start: int, stop: int) -> Iterator[Member]:
    """The regular files of the tar in bytes [start, stop) of `file`, in order; a tar in a tar is such a range.

    Dotfiles are skipped. The caller may read `file` between members. Raises UserError if the archive is compressed,
    truncated, damaged, or followed by another one, and for members without data in the archive: sparse files and links.
    """
    file.seek(start)
    if file.read(6).startswith(_MAGIC):
        raise _compressed(where)
    file.seek(start)
    at = start
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Info, encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all
                after = info.offset_data + info.size
                if info.size < 0 or info.offset < at or (info.isreg() and after > stop) or info.offset_data > stop:
                    raise damaged(where, info.offset - start)
                at = info.offset_data
                if (member := _member(info, where)) is not None:
                    yield member
                at = tar.offset
    except (tarfile.TarError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged(where, at - start) from error
    _check_end(file, where, start, at, stop)


def _member(info: tarfile.TarInfo, where: str) -> Member | None:
    name = info.name.removeprefix("./").encode("utf-8", "surrogateescape")
    if name.rsplit(b"/", 1)[-1].startswith(b"."):
        return None
    if info.issparse() or ((info.islnk() or info.issym()) and is_image(name)):
        raise UserError(
            f"{info.name!r} in {where} is a {'sparse file' if info.issparse() else 'link'}, so the archive does not "
            "contain its bytes; pack it again with tar --hard-dereference --dereference, without --sparse"
        )
    return Member(name, info.offset_data, info.size) if info.isreg() else None


def _check_end(file: BinaryIO, where: str, start: int, at: int, stop: int) -> None:
    """Raise UserError unless a block of zeros is at `at`, right after the last member, and only zeros follow it."""
    file.seek(at)
    if file.read(max(min(_BLOCK, stop - at), 0)) != bytes(_BLOCK):
        raise damaged(where, at - start)
    at += _BLOCK
    while at < stop:
        chunk = file.read(min(1 << 20, stop - at))
        if not chunk or chunk.strip(b"\0"):
            raise UserError(
                f"{where} has data after its end-of-archive mark at byte {at - start}: it is damaged, or two archives "
                "were joined; copy or download it again, or keep each archive in a separate file"
            )
        at += len(chunk)


def damaged(where: str, byte: int) -> UserError:
    """The error for a tar that cannot be read beyond a byte."""
    return UserError(
        f"{where} is truncated or damaged at byte {byte}; copy or download it again, and check its checksum"
    )
