"""An image folder: `root/<class>/**/<image>`, or `root/**/<class>/<image>`."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.classes import natural
from edt_core.data.sources.files import IMAGES, as_text, by_extension, is_image
from edt_core.data.sources.layouts import nesting, packed, refuse_other_layouts, refuse_two_levels
from edt_core.data.sources.listing import Listing
from edt_core.data.sources.places import Place
from edt_core.data.sources.walk import entries, files_below
from edt_core.data.tables import MappedTable, mapped
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.store.digests import listing as listed

if TYPE_CHECKING:
    from edt_core.config import SourceConfig


def list_image_folder(place: Place, config: "SourceConfig", progress: Progress) -> Listing:
    """The images in order of path; the class index is the index of the class folder's name in natural order.

    The class folder is the one directly in the source, or with `config.class_folder` "last" the one that contains the
    image, named by its whole path. Raises UserError for a file instead of a folder, a folder that cannot be read,
    folders without an image unless `config.allow_empty_classes`, folders that are not classes, and a source without
    images.
    """
    if place.pattern:
        raise UserError(
            f"{place} is not a folder; source.kind=image_folder needs a folder with one sub-folder per class"
        )
    files = files_below(place.root, is_image, progress)
    rows, loose = _in_folders(files.rows)
    if not len(rows):
        extensions = f" ({by_extension(files.left_out)})" if files.left_out else ""
        raise UserError(
            f"no images in {place}'s class folders: {files.left_out.total()} other files{extensions} and {loose} "
            f"images outside any class folder found; expected {place}/<class>/<image>, {IMAGES}"
            f"{packed([entry.name for entry in entries(place.root)])}"
        )
    skipped = {"directly in the source, without a class folder": loose} if loose else {}
    if loose:
        progress.warn(f"{loose} images directly in {place} have no class folder and are skipped")
    names = rows.table["name"]
    folders = nesting(rows)
    last = config.class_folder == "last"
    if not config.classes:
        if not (last and len(folders) == 1):  # with class_folder "last" one folder around all others is fine
            refuse_other_layouts(place, folders, names)
        if config.class_folder is None:
            refuse_two_levels(place, folders)
    with_images = _distinct_class_folders(rows, last)
    others = _by_class_folder(files.others, with_images, last)
    empty = [name for name in sorted(others) if not config.classes or as_text(name) in config.classes]
    if empty and not config.allow_empty_classes:
        raise _empty(place, empty, others)
    classes = natural([*with_images, *empty])
    index = pa.array(classes, pa.binary())
    rows = rows.with_column(
        1, "label", [pc.index_in(folder, index).cast(pa.int32()) for folder in _class_folders(rows, last)]
    )
    left_out = dict(files.left_out)
    return Listing(place.root, tuple(map(as_text, classes)), rows.table, "file", left_out, skipped, rows.pages)


def _in_folders(files: MappedTable) -> tuple[MappedTable, int]:
    """The images in folders, and the number of those directly in the source."""
    loose = 0
    for batch in files.batches("name"):
        loose += len(batch) - pc.sum(pc.match_substring(batch.column(0), "/")).as_py()
    if not loose:
        return files, 0
    parts = (batch.filter(pc.match_substring(batch.column("name"), "/")) for batch in files.batches())
    return mapped(parts, files.table.schema), loose


def _class_folders(rows: MappedTable, last: bool) -> Iterator[pa.Array]:
    """The class folder of each image, by batches."""
    for batch in rows.batches("name"):
        if last:
            yield pc.replace_substring_regex(batch.column(0), "/[^/]*$", "")
        else:
            yield pc.list_element(pc.split_pattern(batch.column(0), "/", max_splits=1), 0)


def _distinct_class_folders(rows: MappedTable, last: bool) -> list[bytes]:
    """The class folders, in order of their first image."""
    distinct: dict[bytes, None] = {}
    for folder in _class_folders(rows, last):
        distinct |= dict.fromkeys(pc.unique(folder).to_pylist())
    return list(distinct)


def _by_class_folder(
    others: Mapping[bytes, Counter[str]], with_images: Sequence[bytes], last: bool
) -> dict[bytes, Counter[str]]:
    """The class folders without images, with the counts of their files by extension."""
    excluded = {b"", *with_images}
    if last:  # folders of class folders
        excluded |= {name[: at.start()] for name in with_images for at in re.finditer(b"/", name)}
    totals: dict[bytes, Counter[str]] = {}
    for folder, counts in others.items():
        name = folder if last else folder.partition(b"/")[0]
        totals.setdefault(name, Counter()).update(counts)
    return {name: counts for name, counts in totals.items() if name not in excluded}


def _empty(place: Place, folders: Sequence[bytes], others: Mapping[bytes, Counter[str]]) -> UserError:
    names = [f"{as_text(folder)!r} ({by_extension(others[folder]) or 'no file'})" for folder in folders]
    return UserError(
        f"{len(folders)} of the class folders in {place} contain no image: {listed(names, ', ')}; add images "
        f"({IMAGES}), remove the folders, or keep them as classes without images with source.allow_empty_classes "
        "(--allow-empty-classes)"
    )
