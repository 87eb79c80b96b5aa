"""The folder that a study writes its files to, checked before hours of training."""

import os
from collections.abc import Iterable
from pathlib import Path

from edt_core.errors import UserError


def check_folder(folder: Path, names: Iterable[str], what: str) -> None:
    """Raise UserError if files of these names cannot be written. `what`: what they are, such as "the table"."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; use another --out")
    for path in (folder / name for name in names):
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a file of {what} would be there; use another --out")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not writable, so {what} cannot be written to {folder}; use another --out")
