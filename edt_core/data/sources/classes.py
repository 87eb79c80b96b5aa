"""Class names and indices, and the choice of classes and images that a user makes."""

import difflib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.files import SHOWN, some
from edt_core.data.sources.listing import Listing
from edt_core.data.sources.places import Place
from edt_core.errors import UserError

MAX_CLASSES = 1_000_000


def by_name(names: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names sorted, and the class index (int32) of each of `names`."""
    classes, labels = np.unique(np.array(names, dtype=object), return_inverse=True)
    return tuple(classes.tolist()), labels.astype(np.int32)


def by_index(labels: np.ndarray, names: tuple[str, ...] | None, where: object) -> tuple[str, ...]:
    """Class names for labels that are class indices: those given, or the numbers 0 to the largest label.

    Raises UserError for labels below 0, beyond the names, or too large to be class indices.
    """
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0:
        raise UserError(
            f"{int((labels < 0).sum())} of {len(labels)} images in {where} have the label {low}, which stands for none "
            "(test splits have it); take the files that are labelled, by a pattern such as train-*"
        )
    if names is None and high >= MAX_CLASSES:
        raise UserError(f"the labels in {where} go up to {high}: these are no class indices; number the classes from 0")
    if names is not None and high >= len(names):
        raise UserError(f"the label {high} in {where} is beyond the {len(names)} class names that come with it")
    return names if names is not None else tuple(str(index) for index in range(high + 1))


def select(listing: Listing, place: Place, classes: tuple[str, ...], limit: int | None) -> Listing:
    """The images of the classes wanted, numbered anew in the order of the full list, and `limit` of those."""
    if not len(listing):
        raise UserError(f"no images in {place}: the files that were found hold none")
    if classes:
        listing = _of_classes(listing, place, classes)
    if limit is not None and limit < len(listing):
        listing = listing.take(np.arange(limit) * len(listing) // limit)
    present = pc.unique(listing.table["label"])
    if len(listing.classes) < 2 or len(present) < 2:
        only = listing.classes[present[0].as_py()]
        raise UserError(
            f"only one class ({only!r}, {len(listing)} images) in {place}: a class-conditional model needs at "
            "least 2; put the images of each class into a sub-folder of its own, or take more classes or images"
        )
    return listing


def _of_classes(listing: Listing, place: Place, wanted: tuple[str, ...]) -> Listing:
    known = listing.classes
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, SHOWN, 0.5) or list(known[:SHOWN])
            raise UserError(
                f"source.classes names {name!r}, and {place} has no such class among its {len(known)}; there are "
                f"{', '.join(map(repr, close))}{' and others' if len(known) > len(close) else ''}"
            )
    kept = [index for index, name in enumerate(known) if name in set(wanted)]
    labels = pc.index_in(listing.table["label"], pa.array(kept, pa.int32()))
    column = listing.table.schema.get_field_index("label")
    table = listing.table.set_column(column, "label", labels.cast(pa.int32())).filter(pc.is_valid(labels))
    if not len(table):
        raise UserError(f"the classes {some(wanted)} have no images in {place}")
    return Listing(listing.root, tuple(known[index] for index in kept), table, listing.access)
