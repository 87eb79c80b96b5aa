"""What changed between two sets of labelled images: added, removed and moved images, by sha256 of their bytes.

Legend: N images of a set, K its classes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

UNLABELLED = -1
_SHARE = 0.5  # of the images of both classes that must be common for one to be the other, renamed


@dataclass(frozen=True)
class LabelledImages:
    """A set of images: class names, and of each image its sha256, uint8 [N, 32], and class index, int [N].

    An image with the label -1 is known but in no class, because it is unreadable: it counts as neither added nor
    removed.
    """

    classes: tuple[str, ...]
    digests: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Delta:
    """The changes from a base set to a new one.

    added: class -> images whose bytes the base does not have (or has less often). removed: class of the base -> images
    that the new set does not have. moved: (class of the base, class) -> images with the same bytes in another class.
    renamed: class of the base -> its new name; images of a renamed class are not moved. gained, lost: classes that only
    the new set, only the base has. unchanged: images with the same bytes in the same class.
    """

    unchanged: int
    added: Mapping[str, int] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)
    moved: Mapping[tuple[str, str], int] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    gained: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return any((self.added, self.removed, self.moved, self.renamed, self.gained, self.lost))

    @property
    def num_added(self) -> int:
        return sum(self.added.values())

    @property
    def num_removed(self) -> int:
        return sum(self.removed.values())

    @property
    def num_moved(self) -> int:
        return sum(self.moved.values())


def delta(base: LabelledImages, new: LabelledImages) -> Delta:
    """The changes from `base` to `new`. Equal images are matched one by one: a set may contain an image twice."""
    base_ids, new_ids = _ids(base.digests, new.digests)
    known = np.isin(new_ids, base_ids[base.labels == UNLABELLED]) | (new.labels == UNLABELLED)
    has_label = base.labels != UNLABELLED
    renamed = _renamed(base, new, base_ids, new_ids)
    names = [renamed.get(name, name) for name in base.classes]
    number = {name: index for index, name in enumerate(dict.fromkeys((*names, *new.classes)))}
    before = _pairs(base_ids[has_label], base.labels[has_label], names, number)
    after = _pairs(new_ids[~known], new.labels[~known], new.classes, number)
    unchanged, gone, come = _unmatched(before, after)
    here, there = _moved(gone, come)
    old_name = {renamed.get(name, name): name for name in base.classes}
    label = list(number)
    moved = Counter(
        (old_name[label[one]], label[other])
        for one, other in zip(gone[here, 1].tolist(), come[there, 1].tolist(), strict=True)
    )
    removed = Counter(old_name[label[index]] for index in np.delete(gone, here, axis=0)[:, 1].tolist())
    added = Counter(label[index] for index in np.delete(come, there, axis=0)[:, 1].tolist())
    return Delta(
        unchanged,
        dict(sorted(added.items())),
        dict(sorted(removed.items())),
        dict(sorted(moved.items())),
        renamed,
        tuple(name for name in new.classes if name not in names),
        tuple(name for name in base.classes if name not in renamed and name not in new.classes),
    )


def _ids(base: NDArray[np.uint8], new: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A number for each image of both sets, equal for equal digests."""
    joined = np.ascontiguousarray(np.concatenate([base, new]))
    column = pa.Array.from_buffers(pa.binary(32), len(joined), [None, pa.py_buffer(joined)])
    ids = np.asarray(pc.dictionary_encode(column).indices).astype(np.int64)
    return ids[: len(base)], ids[len(base) :]


def _pairs(
    ids: NDArray[np.int64], labels: NDArray[np.int64], names: "list[str] | tuple[str, ...]", number: Mapping[str, int]
) -> NDArray[np.int64]:
    """(image, number of its class) of each image, int64 [n, 2], sorted."""
    of_label = np.array([number[name] for name in names], dtype=np.int64)
    pairs = np.stack([ids, of_label[labels] if len(ids) else labels], axis=1).astype(np.int64)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _unmatched(before: NDArray[np.int64], after: NDArray[np.int64]) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """The number of pairs that both have, and the pairs that only one has; a pair may occur several times."""
    _, one, other = np.intersect1d(_numbered(before), _numbered(after), assume_unique=True, return_indices=True)
    return len(one), np.delete(before, one, axis=0), np.delete(after, other, axis=0)


def _moved(gone: NDArray[np.int64], come: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of pairs with the same image in both, matched one by one in order."""
    _, here, there = np.intersect1d(
        _numbered(gone[:, :1]), _numbered(come[:, :1]), assume_unique=True, return_indices=True
    )
    return here, there


def _numbered(rows: NDArray[np.int64]) -> NDArray[np.void]:
    """Each sorted row with its number among equal ones, as one value: the values are different."""
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    starts = np.flatnonzero(is_first)
    places = np.arange(len(rows)) - np.repeat(starts, np.diff([*starts.tolist(), len(rows)]))
    table = np.ascontiguousarray(np.column_stack([rows, places]).astype(">i8"))  # in this order bytes sort as numbers
    return table.view(np.dtype((np.void, table.shape[1] * 8))).reshape(len(rows))


def _renamed(
    base: LabelledImages, new: LabelledImages, base_ids: NDArray[np.int64], new_ids: NDArray[np.int64]
) -> dict[str, str]:
    """Classes of the base that have another name now: at least half of the images of both names are common."""
    lost = [index for index, name in enumerate(base.classes) if name not in new.classes]
    gained = [index for index, name in enumerate(new.classes) if name not in base.classes]
    renamed: dict[str, str] = {}
    taken: set[int] = set()
    for old in lost:
        ids = np.unique(base_ids[base.labels == old])
        best, most = None, 0
        for index in gained:
            others = np.unique(new_ids[new.labels == index])
            common = len(np.intersect1d(ids, others, assume_unique=True))
            if index not in taken and common > most and common >= _SHARE * max(len(ids), len(others)):
                best, most = index, common
        if best is not None:
            taken.add(best)
            renamed[base.classes[old]] = new.classes[best]
    return renamed
