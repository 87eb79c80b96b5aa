"""Class names and indices, and the user's selection of classes and images."""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.files import SHOWN, as_text, by_extension, shown, some
from edt_core.data.sources.listing import Listing
from edt_core.data.sources.places import Place
from edt_core.data.tables import mapped
from edt_core.errors import UserError

MAX_CLASSES = 1_000_000
Name = TypeVar("Name", str, bytes)


_NUMBER = re.compile("[0-9]{1,18}")
_NEGATIVE = re.compile(r"-[0-9]+")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?(nan|inf)", re.IGNORECASE)
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}")  # how `as_text` writes bytes that are not UTF-8


def natural(names: Iterable[Name]) -> list[Name]:
    """Distinct names, sorted as text, or by value if all are whole numbers."""
    distinct = sorted(set(names))
    texts = [as_text(name) if isinstance(name, bytes) else name for name in distinct]
    return sorted(distinct, key=int) if all(map(_NUMBER.fullmatch, texts)) else distinct


def by_name(names: Sequence[str], where: object) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names in natural order, and the class index (int32) of each image, for text labels.

    Raises UserError for numbers that cannot be classes: below 0, or with a decimal point.
    """
    classes = natural(names)
    if "" in map(str.strip, classes):
        raise UserError(f"{where} has an empty label; give each image a class, or take it off the list")
    if negative := [name for name in classes if _NEGATIVE.fullmatch(name)]:
        raise UserError(
            f"{where} has {_count(names, negative)} labels below 0 ({some(negative)}), which mean that the image has "
            "no label; remove those images from the list"
        )
    if decimal := [name for name in classes if _DECIMAL.fullmatch(name)]:
        raise UserError(
            f"{where} has {_count(names, decimal)} labels with a decimal point or without a value ({some(decimal)}): a "
            "class is a name or a whole number (pandas writes whole numbers as decimals if some are missing; convert "
            "them with .astype(int))"
        )
    index = {name: place for place, name in enumerate(classes)}
    return tuple(classes), np.fromiter((index[name] for name in names), np.int32, len(names))


def _count(names: Sequence[str], classes: Sequence[str]) -> int:
    """How many of the names are one of these classes."""
    selection = set(classes)
    return sum(name in selection for name in names)


def by_number(labels: np.ndarray, names: tuple[str, ...] | None, where: object) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and the class index (int32) of each image, for labels that are whole numbers.

    With `names`, a label is an index into them. Without, the distinct labels, sorted, are the classes. Raises UserError
    for labels below 0, labels beyond the names, and too many labels.
    """
    if len(labels) and labels.min() < 0:
        raise UserError(
            f"{int((labels < 0).sum())} of {len(labels)} images in {where} have a label below 0, such as "
            f"{labels.min()}, which means that they have no label (common in test splits); use only the labelled "
            "images, for example with a pattern such as train-* if they are in separate files"
        )
    if names is None:
        distinct, places = np.unique(labels, return_inverse=True)
        if len(distinct) >= MAX_CLASSES:
            raise UserError(
                f"{where} has {len(distinct)} different labels, up to {distinct[-1]}; fewer than {MAX_CLASSES} classes "
                "are supported: check that the labels are class indices"
            )
        return tuple(map(str, distinct.tolist())), places.astype(np.int32)
    if len(labels) and labels.max() >= len(names):
        raise UserError(
            f"the label {labels.max()} in {where} is beyond the {len(names)} class names; the first name belongs to "
            "the label 0: correct the labels, or complete the names"
        )
    return names, labels.astype(np.int32)


def refuse_alike(classes: Sequence[str], place: Place) -> None:
    """Raise UserError for class names that differ only in blanks, Unicode normal form or leading zeros.

    Identical names are allowed, because a list of class names may declare them: ImageNet has two classes `crane`.
    Format: Unicode Standard Annex 15; a name with an accent is one code point on most systems and two on macOS.
    """
    alike = _groups(list(dict.fromkeys(classes)), _normalised)
    if alike:
        raise UserError(
            f"several classes of {place} have names that mean the same: {_alike(alike)}; give the images of each class "
            "one name"
        )


def _normalised(name: str) -> str:
    """A name without surplus blanks, in Unicode form NFC; a number without its leading zeros."""
    plain = " ".join(unicodedata.normalize("NFC", name).split())
    return str(int(plain)) if _NUMBER.fullmatch(plain) else plain


def remarks(listing: Listing) -> list[str]:
    """Warnings about a source that was listed without an error."""
    messages, place = [], shown(listing.root.uri)
    classes = listing.classes
    empty = [name for name, count in zip(classes, listing.class_counts.tolist(), strict=True) if not count]
    if empty:
        messages.append(without_images(empty, len(classes)))
    renumbered = all(map(_NUMBER.fullmatch, classes)) and [int(name) for name in classes] != list(range(len(classes)))
    if renumbered:
        messages.append(
            f"the classes of {place} are named by numbers that are not their indices: the indices 0 to "
            f"{len(classes) - 1} mean {some(classes)}"
        )
    if repeated := [name for name, count in Counter(classes).items() if count > 1]:
        messages.append(f"{len(repeated)} names in {place} belong to several classes each: {some(repeated)}")
    if alike := _groups(list(dict.fromkeys(classes)), str.casefold):
        messages.append(f"some class names of {place} differ only in upper and lower case: {_alike(alike)}")
    if escaped := [name for name in classes if _ESCAPED.search(name)]:
        messages.append(
            f"some class names of {place} are not UTF-8; their other bytes are written as \\x..: {some(escaped)}"
        )
    if listing.left_out:
        number = sum(listing.left_out.values())
        messages.append(f"{number} other files in {place} are left out: {by_extension(listing.left_out)}")
    return messages


def without_images(names: Sequence[str], classes: int) -> str:
    """The warning that these classes, out of `classes` in all, have no images."""
    return (
        f"{len(names)} of {classes} classes have no images: {some(names)}; the model keeps their indices, but they "
        "are neither sampled nor evaluated"
    )


def _groups(names: Sequence[str], key: Callable[[str], str]) -> list[list[str]]:
    """Groups of two or more names that have the same key."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _alike(groups: Sequence[Sequence[str]]) -> str:
    """The first groups for a message, in ASCII so that the difference shows."""
    return "; ".join(" and ".join(map(ascii, group)) for group in groups[:SHOWN])


def select(listing: Listing, place: Place, classes: tuple[str, ...], limit: int | None) -> Listing:
    """The images of the selected classes, renumbered in the order of the full list, and `limit` of those."""
    if not len(listing):
        raise UserError(f"no images in {place}: its files contain none; check that this is the data set")
    if classes:
        listing = _of_classes(listing, place, classes)
    if limit is not None and limit < len(listing):
        listing = listing.take(np.arange(limit) * len(listing) // limit)
    present = pc.unique(listing.table["label"])
    if len(listing.classes) < 2 or len(present) < 2:
        only = listing.classes[present[0].as_py()]
        raise UserError(
            f"only one class ({only!r}, {len(listing)} images) in {place}: a class-conditional model needs at "
            "least 2; put the images of each class into a separate sub-folder, or select more classes or images (for "
            "images without labels: docs/data.md, Images without labels)"
        )
    return listing


def _of_classes(listing: Listing, place: Place, selection: tuple[str, ...]) -> Listing:
    classes = listing.classes
    for name in selection:
        if name not in classes:
            close = difflib.get_close_matches(name, classes, SHOWN, 0.5) or list(classes[:SHOWN])
            raise UserError(
                f"source.classes names {name!r}, but {place} has no such class among its {len(classes)}; it has "
                f"{', '.join(map(repr, close))}{' and others' if len(classes) > len(close) else ''}"
            )
    indices = [index for index, name in enumerate(classes) if name in set(selection)]
    column = listing.table.schema.get_field_index("label")

    def parts() -> Iterator[pa.RecordBatch]:
        for batch in listing.rows.batches():
            labels = pc.index_in(batch.column(column), pa.array(indices, pa.int32())).cast(pa.int32())
            yield batch.set_column(column, "label", labels).filter(pc.is_valid(labels))

    rows = mapped(parts(), listing.table.schema)
    if not len(rows):
        raise UserError(f"the classes {some(selection)} have no images in {place}; choose others with source.classes")
    return replace(listing, classes=tuple(classes[index] for index in indices)).with_rows(rows)
