"""The trash of a local store: `<store>/.trash/<time>/<kind>/<fingerprint>` contains what one `edt gc` removed.

One rename moves an artifact there, so that a killed process leaves it complete in the store or in the trash. Nothing
else reads the trash: its name begins with a dot. To restore an artifact, move its folder to `<store>/<kind>/`. A later
`edt gc` deletes what was moved a day ago or earlier. Object stores have no rename and no trash.
"""

import os
import shutil
import time
from calendar import timegm
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edt_core.errors import UserError
from edt_core.store.contents import files_below, is_stamped, stamped_name
from edt_core.store.errors import clear_disk_errors
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME

NAME = ".trash"
DAY_S = 24 * 3600


@dataclass(frozen=True)
class Discarded:
    """The content that one earlier `edt gc` moved to the trash."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Trash:
    """The trash of the store at `store`. Use it only with exclusive access to the store (`Store.to_itself`)."""

    store: Path

    @classmethod
    def of(cls, root: Folder) -> "Trash | None":
        """The trash of a local store; None for a remote one. Raises UserError if the trash is not a folder."""
        if root.local is None:
            return None
        trash = cls(root.local)
        if os.path.lexists(trash.root) and (trash.root.is_symlink() or not trash.root.is_dir()):
            raise UserError(
                f"{trash.root} is a link or a file, but gc needs a folder there for what it removes; move it away"
            )
        return trash

    @property
    def root(self) -> Path:
        return self.store / NAME

    def discarded(self, whatever_age: bool = False) -> list[Discarded]:
        """The content moved here a day ago or earlier, or, with `whatever_age`, all of it."""
        return [
            Discarded(path.name, sum(files_below(Folder(str(path))).values()))
            for path in self._entries()
            if (created := _creation_time(path)) is not None and (whatever_age or created <= time.time() - DAY_S)
        ]

    def others(self) -> dict[str, str]:
        """Other content of the trash, which is never deleted: path in the store -> reason."""
        names = [path.name for path in self._entries() if _creation_time(path) is None]
        return {f"{NAME}/{name}": "not created by `edt gc`" for name in names}

    def new(self) -> Path:
        """The path of a new folder in the trash; the first `move` creates it."""
        return self.root / stamped_name()

    def move(self, name: str, to: Path) -> str:
        """Move a folder of the store into a folder of `new`, in one step. Return the reason of a failure, or ""."""
        target = to / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.store / name).rename(target)
        except OSError as error:  # another file system, missing permissions, or a full disk
            with suppress(OSError):
                os.removedirs(target.parent)  # only the empty ones
            return f"cannot be moved to {to}: {error.strerror}"
        return ""

    def delete(self, discarded: Discarded) -> None:
        """Delete what an earlier `edt gc` moved here, manifests first: half an artifact must not look valid."""
        folder = self.root / discarded.name
        with clear_disk_errors(str(folder)):
            for manifest in folder.glob(f"*/*/{MANIFEST_NAME}"):
                manifest.unlink()
            shutil.rmtree(folder)

    def _entries(self) -> list[Path]:
        return sorted(self.root.iterdir()) if self.root.is_dir() else []


def _creation_time(path: Path) -> float | None:
    """The time in the name of a folder of `new`, in seconds since 1970; None for other content."""
    if not is_stamped(path.name) or path.is_symlink() or not path.is_dir():
        return None
    with suppress(ValueError):
        return timegm(time.strptime(path.name.partition("-")[0], "%Y%m%dT%H%M%S"))
    return None
