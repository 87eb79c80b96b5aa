"""Artifacts by the beginning of their fingerprint, as tables show it."""

import re
from collections.abc import Iterable

from edt_core.errors import UserError
from edt_core.store.folder import Folder
from edt_core.store.layout import KINDS, MANIFEST_NAME

PREFIX = re.compile("[0-9a-f]{4,64}")
_MOST_SHOWN = 5


def whole_folder(folder: Folder) -> Folder | None:
    """The one artifact beside `folder` whose fingerprint begins with its name; None if there is none.

    Raises UserError if there are several.
    """
    return _only(_matches(folder), folder.name)


def artifact_folder(store: Folder, prefix: str) -> Folder | None:
    """The one artifact of a store, of any kind, whose fingerprint begins with `prefix`; None if there is none.

    Raises UserError if there are several.
    """
    return _only([match for kind in KINDS for match in _matches(store.child(f"{kind}/{prefix}"))], prefix)


def fingerprints(stores: Iterable[Folder], prefix: str) -> set[str]:
    """The fingerprints of some stores' artifacts that begin with `prefix`."""
    return {match.name for store in stores for kind in KINDS for match in _matches(store.child(f"{kind}/{prefix}"))}


def _matches(folder: Folder) -> list[Folder]:
    root, _, prefix = folder.uri.rpartition("/")
    if not root or not PREFIX.fullmatch(prefix):
        return []
    matches = [Folder(root).child(name) for name in Folder(root).names() if name.startswith(prefix)]
    return [match for match in matches if match.exists(MANIFEST_NAME)]


def _only(matches: list[Folder], prefix: str) -> Folder | None:
    """The only match, or None. Raises UserError if there are several."""
    if len(matches) > 1:
        shown = ", ".join("/".join(match.uri.split("/")[-2:]) for match in matches[:_MOST_SHOWN])
        raise UserError(
            f"{len(matches)} artifacts have a fingerprint that begins with {prefix}: {shown}; give more digits"
        )
    return matches[0] if matches else None
