"""The trash of a local store: `<store>/.trash/<time>/<kind>/<fingerprint>`, what one `edt gc` removed.

An artifact gets there by one rename, so that a process that is killed leaves it in the store or in the trash, whole.
Nothing else reads the trash: its name begins with a dot. To put an artifact back, move its folder to
`<store>/<kind>/`. A later `edt gc` deletes what was moved a day ago or earlier. Object stores have no rename and no
trash.
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
    """What one earlier `edt gc` moved to the trash."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Trash:
    """The trash of the store at `store`. It is used only while nobody else uses the store (`Store.to_itself`)."""

    store: Path

    @classmethod
    def of(cls, root: Folder) -> "Trash | None":
        """The trash of a local store; None for a remote one. Raises UserError where the trash is no folder."""
        if root.local is None:
            return None
        trash = cls(root.local)
        if os.path.lexists(trash.root) and (trash.root.is_symlink() or not trash.root.is_dir()):
            raise UserError(
                f"{trash.root} is a link or a file, and gc keeps there what it removes; move it away, and a folder is "
                "made in its place"
            )
        return trash

    @property
    def root(self) -> Path:
        return self.store / NAME

    def discarded(self, whatever_age: bool = False) -> list[Discarded]:
        """What was moved here a day ago or earlier, or, with `whatever_age`, all that was moved here."""
        return [
            Discarded(path.name, sum(files_below(Folder(str(path))).values()))
            for path in self._entries()
            if (made := _made(path)) is not None and (whatever_age or made <= time.time() - DAY_S)
        ]

    def others(self) -> dict[str, str]:
        """What else lies in the trash and stays there: path in the store -> why."""
        return {f"{NAME}/{path.name}": "not made by `edt gc`" for path in self._entries() if _made(path) is None}

    def new(self) -> Path:
        """A folder for what is removed now; the first `move` makes it."""
        return self.root / stamped_name()

    def move(self, name: str, to: Path) -> str:
        """Move a folder of the store into a folder of `new`, in one step. Returns why it cannot be, or ""."""
        target = to / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.store / name).rename(target)
        except OSError as error:  # it is on a file system of its own, or may not be moved, or the disk is full
            with suppress(OSError):
                os.removedirs(target.parent)  # those that are empty
            return f"cannot be moved to {to}: {error.strerror}"
        return ""

    def delete(self, discarded: Discarded) -> None:
        """Delete what an earlier `edt gc` moved here, manifests first: an artifact that is half deleted is none."""
        folder = self.root / discarded.name
        with clear_disk_errors(str(folder)):
            for manifest in folder.glob(f"*/*/{MANIFEST_NAME}"):
                manifest.unlink()
            shutil.rmtree(folder)

    def _entries(self) -> list[Path]:
        return sorted(self.root.iterdir()) if self.root.is_dir() else []


def _made(path: Path) -> float | None:
    """When `new` made a folder, by its name, in seconds since 1970; None for what `new` has not made."""
    if not is_stamped(path.name) or path.is_symlink() or not path.is_dir():
        return None
    with suppress(ValueError):
        return timegm(time.strptime(path.name.partition("-")[0], "%Y%m%dT%H%M%S"))
    return None
