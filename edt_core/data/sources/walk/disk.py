"""The files and folders on a disk."""

import errno
import os
import stat
from collections.abc import Iterator

from edt_core.data.sources.files import as_text
from edt_core.data.sources.walk.entry import Entry, hidden
from edt_core.errors import UserError

_MASK = (1 << 64) - 1


def disk_entries(root: bytes, folder: bytes) -> Iterator[Entry]:
    """The files and folders directly in a folder. Raises UserError for one that cannot be read."""
    try:
        with os.scandir(os.path.join(root, folder)) as items:
            for item in items:
                if hidden(item.name):
                    continue
                name = folder + b"/" + item.name if folder else item.name
                if not item.is_file(follow_symlinks=False) and _is_folder(root, name, item):
                    yield Entry(name, True, 0, "")
                    continue
                try:
                    status = item.stat()
                except OSError:  # a broken link, or removed since: reading it reports the error
                    yield Entry(name, False, 0, "")
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield Entry(name, False, status.st_size, "", stat_of(status))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(_loop(root, folder, "leads back to itself")) from error
        where = as_text(os.path.join(root, folder))
        remedy = "correct its permissions" if isinstance(error, PermissionError) else "check the address and the disk"
        raise UserError(f"cannot read the folder {where}: {error.strerror}; {remedy}") from error


def stat_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """The values of STAT."""
    return status.st_mtime_ns & _MASK, status.st_ctime_ns & _MASK, status.st_ino & _MASK, status.st_dev & _MASK


def _is_folder(root: bytes, name: bytes, item: "os.DirEntry[bytes]") -> bool:
    """Whether it is a folder, or a link to one. Raises UserError for a link that makes the walk endless."""
    try:
        is_folder = item.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(_loop(root, name, "leads back to itself")) from error
        raise
    if is_folder and item.is_symlink():
        _check_no_loop(root, name)
    return is_folder


def _check_no_loop(root: bytes, name: bytes) -> None:
    """Raise UserError for a link to a folder that contains the link: the walk would never end."""
    target, folder = _identity(os.path.join(root, name)), name
    while folder:
        folder = os.path.dirname(folder)
        above = os.path.join(root, folder)
        if _identity(above) == target:
            raise UserError(_loop(root, name, f"leads to {as_text(above.rstrip(b'/'))}, which contains it"))


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _loop(root: bytes, name: bytes, what: str) -> str:
    """The message for a loop of symbolic links; `name` is the link that closes it."""
    path = os.path.join(root, name).rstrip(b"/")
    to = f" -> {as_text(os.readlink(path))}" if os.path.islink(path) else ""
    return f"a loop of symbolic links in the source: {as_text(path)}{to} {what}; remove the link, or change its target"


def walk_disk(root: bytes, folder: bytes) -> Iterator[Entry]:
    """Every file at any depth below a folder of the source."""
    pending = [folder]
    while pending:
        for entry in disk_entries(root, pending.pop()):
            if entry.is_folder:
                pending.append(entry.name)
            else:
                yield entry
