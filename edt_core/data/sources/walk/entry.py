"""One file or folder of a source."""

from typing import NamedTuple

# Folders that systems create: macOS's archiver, Synology's thumbnails, Windows, ext4.
_OF_THE_SYSTEM = {b"__MACOSX", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found"}
STAT = ("mtime_ns", "ctime_ns", "inode", "device")  # what the disk says of a file beside its size, modulo 2**64
_NOT_THERE = (0, 0, 0, 0)


class Entry(NamedTuple):
    """One file or folder. `version` is the store's own token for the content of a remote file, `stat` that of a disk.

    `version` is empty for a local file; `stat` has the values of STAT, zeros for a remote file or one that is gone.
    """

    name: bytes
    is_folder: bool
    size: int
    version: str
    stat: tuple[int, int, int, int] = _NOT_THERE


def hidden(name: bytes) -> bool:
    """Whether a file or folder of this name is no part of a source: dotfiles, and folders that systems create."""
    return name.startswith(b".") or name in _OF_THE_SYSTEM
