"""Which folders of a store are artifacts, by name and content. Everything else in it belongs to the user.

A workflow writes `<kind>/<fingerprint>/manifest.json` and `<kind>/<fingerprint>/<attempt>/...`. It never creates links,
so a link always belongs to the user.
"""

import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from edt_core.store.folder import Folder, is_hidden, is_staged
from edt_core.store.layout import KINDS, MANIFEST_NAME
from edt_core.store.manifest import Manifest

_FINGERPRINT = re.compile("[0-9a-f]{64}")
_ATTEMPT = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")  # of `stamped_name`
Identity = tuple[str, str]  # kind, fingerprint


def stamped_name() -> str:
    """A new name for an attempt: the time, so that names sort by age, and a random suffix."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"


def is_stamped(name: str) -> bool:
    """Whether a name has the form of `stamped_name`."""
    return _ATTEMPT.fullmatch(name) is not None


def artifact_folders(root: Folder) -> tuple[list[Identity], dict[str, str]]:
    """The folders of a store that can be artifacts, and the other content next to them: path in the store -> reason."""
    folders: list[Identity] = []
    others: dict[str, str] = {}
    for kind in KINDS:
        if reason := _not_a_folder(root.child(kind)):
            others[kind] = reason
            continue
        for name in root.child(kind).names():
            if not _FINGERPRINT.fullmatch(name):
                others[f"{kind}/{name}"] = "not an artifact: its name is not a fingerprint of 64 hex digits"
            elif reason := _not_a_folder(root.child(f"{kind}/{name}")):
                others[f"{kind}/{name}"] = f"not an artifact: {reason}"
            else:
                folders.append((kind, name))
    return folders, others


def foreign_names(folder: Folder, committed: str) -> dict[str, str]:
    """The content of an artifact's folder that no workflow has written: name -> reason.

    `committed` is the attempt that the manifest names, "" if there is no manifest.
    """
    reasons: dict[str, str] = {}
    for name in folder.names():
        if name == MANIFEST_NAME:
            if _is_link(folder, name):
                reasons[name] = "a link"
        elif name != committed and not is_stamped(name) and not is_staged(name):
            reasons[name] = "not an attempt"
        elif reason := _not_a_folder(folder.child(name)):
            reasons[name] = reason
    return reasons


def foreign(folder: Folder, manifest: Manifest | None) -> dict[str, str]:
    """`foreign_names`, and if there are none, the files of the committed attempt that its manifest does not list."""
    if manifest is None:
        return foreign_names(folder, "")
    reasons = foreign_names(folder, manifest.attempt)
    if not reasons and manifest.attempt:
        listed = {entry.path for entry in manifest.files}
        below = (name for name in files_below(folder.child(manifest.attempt)) if not is_hidden(name))
        reasons = {f"{manifest.attempt}/{name}": f"not in {MANIFEST_NAME}" for name in below if name not in listed}
    return reasons


def files_below(folder: Folder) -> dict[str, int]:
    """Name -> bytes of every file below, hidden files included. A link counts as a file and is not followed."""
    if (root := folder.local) is None:
        return folder.walk()
    return dict(_files(root))


def _files(root: Path) -> Iterator[tuple[str, int]]:
    for place, folders, names in os.walk(root):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*names, *links):
            path = Path(place, name)
            yield path.relative_to(root).as_posix(), path.lstat().st_size


def _not_a_folder(folder: Folder) -> str:
    """The reason why an existing name is not a real folder, or ""."""
    if (path := folder.local) is None or not os.path.lexists(path):
        return ""
    if path.is_symlink():
        return f"a link, to {os.readlink(path)}"
    return "" if path.is_dir() else "a file, not a folder"


def _is_link(folder: Folder, name: str) -> bool:
    return (root := folder.local) is not None and (root / name).is_symlink()
