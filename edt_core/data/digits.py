"""The quickstart's real images: 1,797 scans of handwritten digits. `digits.txt` states their origin and licence."""

import os
import shutil
import socket
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np

from edt_core.data.images import write_image_folder
from edt_core.errors import UserError
from edt_core.store.errors import clear_disk_errors

NUM_DIGITS = 1797
_OF_NODE = Path(".cache/edt/sources/digits")  # below the home folder, where the store is on no disk
_FILE = Path(__file__).with_name("digits.npz")


def write_digits(root: Path) -> Path:
    """Write the digits (8x8, 17 grey levels) as an image folder, one folder per class, unless they exist.

    Returns `root`. The folder appears atomically: a killed writer leaves nothing at `root`. An incomplete folder is
    rewritten. Raises UserError if it contains other files.
    """
    if _complete(root):
        return root
    with np.load(_FILE) as digits:  # images uint8 [1797, 8, 8] in 0..16, labels uint8 [1797]
        pixels, labels = np.round(digits["images"] * (255 / 16)).astype(np.uint8), digits["labels"]
    staging = root.with_name(f".staging-{uuid.uuid4().hex}")
    try:
        write_image_folder(staging, pixels, [str(label) for label in labels])
        if root.exists() and not _complete(root):
            _check_same(root, staging)
            shutil.rmtree(root)
        with suppress(OSError):  # another run was faster: its folder is the same
            os.replace(staging, root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return root


def digits_folder(store: Path | None) -> Path:
    """Where a run has the digits: in its local store, or, with None, in the home folder of each node."""
    return Path.home() / _OF_NODE if store is None else store / "sources" / "digits"


def restore_digits(folder: Path | None) -> None:
    """Write the digits if `folder` is theirs on each node: the node that listed them need not be the one of this work.

    Any other folder is left alone. Raises UserError if it cannot be written.
    """
    if folder is not None and folder.parts[-len(_OF_NODE.parts) :] == _OF_NODE.parts:
        with clear_disk_errors(f"{folder} on {socket.gethostname()}"):
            write_digits(folder)


def _check_same(root: Path, whole: Path) -> None:
    """Raise UserError if the folder to replace contains a file that is not in the complete one."""
    paths = [path for path in root.rglob("*") if not _is_folder(path)] if _is_folder(root) else [root]
    others = sorted(path for path in paths if not _is_same(path, whole / path.relative_to(root)))
    if others:
        raise UserError(
            f"{root} is for the digits, but contains {len(others)} other files (such as {others[0]}); move them "
            "elsewhere and rerun"
        )


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_same(path: Path, other: Path) -> bool:
    return not path.is_symlink() and other.is_file() and path.read_bytes() == other.read_bytes()


def _complete(root: Path) -> bool:
    return sum(1 for _ in root.glob("*/*.png")) == NUM_DIGITS
