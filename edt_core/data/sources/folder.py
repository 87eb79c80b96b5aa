"""An image folder: `root/<class>/**/<image>`, or `root/**/<class>/<image>`."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.classes import natural
from edt_core.data.sources.files import IMAGES, as_text, by_extension, is_image
from edt_core.data.sources.layouts import nesting, packed, refuse_other_layouts, refuse_two_levels
from edt_core.data.sources.listing import Listing
from edt_core.data.sources.places import Place
from edt_core.data.sources.walk import entries, files_below
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
    table = files.table.filter(pc.match_substring(files.table["name"], "/"))
    loose = len(files.table) - len(table)
    if not len(table):
        extensions = f" ({by_extension(files.left_out)})" if files.left_out else ""
        raise UserError(
            f"no images in {place}'s class folders: {files.left_out.total()} other files{extensions} and {loose} "
            f"images outside any class folder found; expected {place}/<class>/<image>, {IMAGES}"
            f"{packed([entry.name for entry in entries(place.root)])}"
        )
    skipped = {"directly in the source, without a class folder": loose} if loose else {}
    if loose:
        progress.warn(f"{loose} images directly in {place} have no class folder and are skipped")
    folders = nesting(table["name"])
    last = config.class_folder == "last"
    if not config.classes:
        if not (last and len(folders) == 1):  # with class_folder "last" one folder around all others is fine
            refuse_other_layouts(place, folders, table["name"])
        if config.class_folder is None:
            refuse_two_levels(place, folders)
    folder = _class_folders(table["name"], last)
    with_images = pc.unique(folder).to_pylist()
    others = _by_class_folder(files.others, with_images, last)
    empty = [name for name in sorted(others) if not config.classes or as_text(name) in config.classes]
    if empty and not config.allow_empty_classes:
        raise _empty(place, empty, others)
    names = natural([*with_images, *empty])
    labels = pc.index_in(folder, pa.array(names, pa.binary())).cast(pa.int32())
    table = table.add_column(1, "label", labels)
    return Listing(place.root, tuple(map(as_text, names)), table, "file", dict(files.left_out), skipped)


def _class_folders(names: pa.ChunkedArray, last: bool) -> pa.ChunkedArray:
    if last:
        return pc.replace_substring_regex(names, "/[^/]*$", "")
    return pc.list_element(pc.split_pattern(names, "/", max_splits=1), 0)


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
