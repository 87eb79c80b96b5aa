"""What changed in the images since the champion was trained: by content, and by class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edt_core.data.sources import list_source
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, Source
from edt_core.store.layout import CLASSES_NAME
from edt_core.store.store import Store
from jobs.stages.reuse.originals import Originals

_SHOWN = 8  # classes that are named


@dataclass(frozen=True)
class Delta:
    """The images of each class: the champion's, those of now, and of these the new ones.

    An image is its bytes: a changed file counts as one added and one removed, and a class that has another name as
    removed and added. `added` is None if the digests of the images are not known, as of a remote source.
    """

    before: Mapping[str, int]
    now: Mapping[str, int]
    added: Mapping[str, int] | None = None

    @property
    def gained(self) -> list[str]:
        """Classes that the champion does not know."""
        return [name for name in self.now if name not in self.before]

    @property
    def lost(self) -> list[str]:
        """Classes of the champion that have no images any more."""
        return [name for name in self.before if name not in self.now]

    @property
    def removed(self) -> dict[str, int] | None:
        """Images of the champion that are gone from each class."""
        if self.added is None:
            return None
        names = dict.fromkeys([*self.before, *self.now])
        return {n: max(0, self.before.get(n, 0) + self.added.get(n, 0) - self.now.get(n, 0)) for n in names}

    def to_dict(self) -> dict[str, Any]:
        classes = {"gained": self.gained, "lost": self.lost}
        return {
            "before": dict(self.before),
            "now": dict(self.now),
            "added": self.added,
            "removed": self.removed,
            **classes,
        }

    def __str__(self) -> str:
        names = dict.fromkeys([*self.before, *self.now])
        added, removed = self.added, self.removed or {}
        if added is None:
            net = {name: self.now.get(name, 0) - self.before.get(name, 0) for name in names}
            changes = {name: f"{number:+d}" for name, number in net.items() if number}
            parts = [f"the champion has {sum(self.before.values())}"]
        else:
            pairs = {name: (added.get(name, 0), removed.get(name, 0)) for name in names}
            changes = {n: " ".join(_signed(*pair)) for n, pair in pairs.items() if any(pair)}
            parts = [f"{sum(added.values())} added, {sum(removed.values())} removed"]
        shown = [f"{name} {change}" for name, change in list(changes.items())[:_SHOWN]]
        parts += [", ".join(shown)] if shown else []
        parts += [f"{len(changes) - _SHOWN} more classes"] if len(changes) > _SHOWN else []
        parts += [f"new classes: {', '.join(self.gained[:_SHOWN])}"] if self.gained else []
        parts += [f"classes that are gone: {', '.join(self.lost[:_SHOWN])}"] if self.lost else []
        return "; ".join(parts)


def _signed(added: int, removed: int) -> list[str]:
    return [f"{sign}{number}" for sign, number in (("+", added), ("-", removed)) if number]


def delta_of(version: Any | None, store: Store, source: Source) -> Delta | None:
    """The change since a version was trained; None if its image artifact is gone, or the source was not listed."""
    if version is None or source.selection is None:
        return None
    try:
        images = Artifact.read(store.folder("images", version.tags["edt.images"]))
        before = dict(zip(images.read_json(CLASSES_NAME), images.counts["class_counts"], strict=True))
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None
    listing = list_source(source.selection)
    now = dict(zip(listing.classes, map(int, listing.class_counts), strict=True))
    originals = None if source.digests is None else Originals.read(images)
    if originals is None or source.digests is None or len(source.digests) != len(listing):
        return Delta(before, now)
    known = set(map(bytes, originals.digests))
    labels = np.asarray(listing.table["label"])
    is_new = np.array([bytes(digest) not in known for digest in source.digests], np.bool_)
    counts = np.bincount(labels[is_new], minlength=len(listing.classes))
    return Delta(before, now, dict(zip(listing.classes, map(int, counts), strict=True)))
