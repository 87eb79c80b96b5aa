"""Private files of one user: no other user can read them, and none that another user may have written is read."""

import os
import stat
from pathlib import Path

from edt_core.errors import UserError
from edt_core.files.small_files import read_bounded

FILE_MODE, FOLDER_MODE = 0o600, 0o700
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private(folder: Path) -> None:
    """Create a folder that only this user can enter, or remove the rights of others from an existing one.

    Raises UserError if it belongs to another user or is a link, which may lead to any folder of this user.
    """
    folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    if folder.is_symlink():
        raise UserError(f"{folder} is not used: it is a link, but a folder was expected. Remove it")
    _check_owner(folder, folder.stat())
    if stat.S_IMODE(folder.stat().st_mode) & ~FOLDER_MODE:
        folder.chmod(FOLDER_MODE)


def read_own(path: Path) -> bytes:
    """Read a file that only this user or root owns and can write, in such a folder.

    Raises FileNotFoundError if it does not exist, and UserError if another user may have written it, or if it is not a
    regular file.
    """

    def check(status: os.stat_result) -> None:
        _check_not_others(path, status, FILE_MODE)
        _check_not_others(path.parent, path.parent.stat(), FOLDER_MODE)

    return read_bounded(path, check=check)


def _check_not_others(place: Path, status: os.stat_result, mode: int) -> None:
    _check_owner(place, status)
    if status.st_mode & _OTHERS_WRITE:
        raise UserError(
            f"{place} is not used: other users can write it (mode {stat.S_IMODE(status.st_mode):04o}). Check "
            f"its content, then run `chmod {mode:o} {place}`"
        )


def private_opener(path: str, flags: int) -> int:
    """An opener for `open`: only this user can read a new file."""
    return os.open(path, flags, FILE_MODE)


def _check_owner(place: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise UserError(
            f"{place} is not used: it belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}. "
            "Run this as that user, or remove it and rerun `edt schedule` as this user"
        )
