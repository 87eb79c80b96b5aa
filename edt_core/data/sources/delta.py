"""What changed between two sets of labelled images, by the sha256 of their bytes and the names of their classes."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHOWN = 5  # classes in a text


@dataclass(frozen=True, eq=False)
class LabelledDigests:
    """N images: sha256 of each, uint8 [N, 32], and its class, int [N], an index into `classes`."""

    digests: NDArray[np.uint8]
    labels: NDArray[np.integer[Any]]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ImageDelta:
    """The difference of two sets of images. The numbers are by class name; `moved` is by (old class, new class).

    `renamed`: old class -> new class, if all images of a class that is gone are in one new class. Its images are not in
    `moved`. `gained` and `lost` are the other classes that only one of the sets has.
    """

    before: int
    now: int
    unchanged: int
    added: Mapping[str, int] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)
    moved: Mapping[tuple[str, str], int] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    gained: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.added or self.removed or self.moved or self.renamed or self.gained or self.lost)

    def __str__(self) -> str:
        """The difference in one line: `+100 -3 images: 3 +60, 8 +40, 5 -3; new class 9`."""
        if not self:
            return "no image changed"
        total = {name: self.added.get(name, 0) for name in (*self.added, *self.removed)}
        by_size = sorted(total, key=lambda name: -max(total[name], self.removed.get(name, 0)))
        numbers = [" ".join(_signed(name, self.added, self.removed)) for name in by_size]
        parts = [f"+{sum(self.added.values()):,} -{sum(self.removed.values()):,} images"]
        parts[0] += f": {_listed(numbers)}" if numbers else ""
        parts += [f"moved {_listed([f'{a} -> {b} {n:,}' for (a, b), n in self.moved.items()])}"] if self.moved else []
        parts += [f"renamed {_listed([f'{a} -> {b}' for a, b in self.renamed.items()])}"] if self.renamed else []
        parts += [f"new classes {_listed(self.gained)}"] if self.gained else []
        parts += [f"classes gone {_listed(self.lost)}"] if self.lost else []
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The difference as JSON values."""
        moved = [{"from": a, "to": b, "images": number} for (a, b), number in self.moved.items()]
        return {**asdict(self), "moved": moved, "gained": list(self.gained), "lost": list(self.lost)}


def image_delta(before: LabelledDigests, now: LabelledDigests) -> ImageDelta:
    """Compare two sets of images.

    An image is unchanged if its bytes are in a class of the same name; one that is in another class was moved. Of
    copies with the same bytes each counts.
    """
    names = sorted({*before.classes, *now.classes})
    surplus = _surplus(before, now, names)
    added, removed, moved = Counter[int](), Counter[int](), Counter[tuple[int, int]]()
    for old, new in surplus:
        for pair in zip(old, new, strict=False):
            moved[pair] += 1
        removed.update(old[len(new) :])
        added.update(new[len(old) :])
    lost, gained = (set(a) - set(b) for a, b in ((before.classes, now.classes), (now.classes, before.classes)))
    renamed = _renamed(before, {(names[a], names[b]): n for (a, b), n in moved.items()}, lost, gained)
    kept_moves = {(names[a], names[b]): n for (a, b), n in sorted(moved.items()) if names[a] not in renamed}
    return ImageDelta(
        before=len(before.labels),
        now=len(now.labels),
        unchanged=len(before.labels) - sum(len(old) for old, _ in surplus),
        added={names[label]: number for label, number in sorted(added.items())},
        removed={names[label]: number for label, number in sorted(removed.items())},
        moved=kept_moves,
        renamed=renamed,
        gained=tuple(sorted(gained - set(renamed.values()))),
        lost=tuple(sorted(lost - set(renamed))),
    )


def _surplus(before: LabelledDigests, now: LabelledDigests, names: list[str]) -> list[tuple[list[int], list[int]]]:
    """For each different image that changed: the classes of its surplus copies before, and those of now."""
    place = {name: index for index, name in enumerate(names)}
    labels = [np.array([place[name] for name in side.classes], np.int64)[side.labels] for side in (before, now)]
    digests = np.ascontiguousarray(np.concatenate([before.digests, now.digests]))
    if not len(digests):
        return []
    words = digests.view(np.uint64).reshape(len(digests), -1)
    classes, sign = np.concatenate(labels), np.repeat([-1, 1], [len(labels[0]), len(labels[1])])
    order = np.lexsort((classes, *words.T))
    words, classes, sign = words[order], classes[order], sign[order]
    new_image = np.append(True, (words[1:] != words[:-1]).any(axis=1))
    new_pair = new_image | np.append(True, classes[1:] != classes[:-1])
    starts = np.flatnonzero(new_pair)
    difference = np.add.reduceat(sign, starts) if len(starts) else np.empty(0, np.int64)
    image, label = np.cumsum(new_image)[starts], classes[starts]
    changed = difference != 0
    return list(_by_image(image[changed], label[changed], difference[changed]))


def _by_image(
    image: NDArray[np.int64], label: NDArray[np.int64], difference: NDArray[np.int64]
) -> Iterator[tuple[list[int], list[int]]]:
    """Rows in order of image -> (classes with a surplus before, classes with a surplus now), a class for each copy."""
    for part in np.split(np.arange(len(image)), np.flatnonzero(np.diff(image)) + 1):
        old = np.repeat(label[part], np.maximum(-difference[part], 0)).tolist()
        new = np.repeat(label[part], np.maximum(difference[part], 0)).tolist()
        if old or new:
            yield old, new


def _renamed(
    before: LabelledDigests, moved: Mapping[tuple[str, str], int], lost: set[str], gained: set[str]
) -> dict[str, str]:
    """Old class -> new class, for each class that is gone and whose images are all in one new class."""
    totals = np.bincount(before.labels, minlength=len(before.classes))
    images = dict(zip(before.classes, totals.tolist(), strict=True))
    pairs = {
        old: new for (old, new), number in moved.items() if old in lost and new in gained and number == images[old]
    }
    return {old: new for old, new in sorted(pairs.items()) if list(pairs.values()).count(new) == 1}


def _signed(name: str, added: Mapping[str, int], removed: Mapping[str, int]) -> Iterator[str]:
    yield name
    if number := added.get(name):
        yield f"+{number:,}"
    if number := removed.get(name):
        yield f"-{number:,}"


def _listed(texts: "list[str] | tuple[str, ...]") -> str:
    """The first texts, and how many more there are."""
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
