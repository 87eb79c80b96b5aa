"""An image folder: `root/<class>/**/<image>`, or `root/**/<class>/<image>`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.classes import natural
from edt_core.data.sources.files import IMAGES, as_text, by_extension, entries, files_below, is_image
from edt_core.data.sources.layouts import nesting, packed, refuse_other_layouts, refuse_two_levels
from edt_core.data.sources.listing import Listing
from edt_core.data.sources.places import Place
from edt_core.errors import UserError
from edt_core.integrity import listing as listed
from edt_core.progress import Progress

if TYPE_CHECKING:
    from edt_core.config import SourceConfig


def list_image_folder(place: Place, config: "SourceConfig", progress: Progress) -> Listing:
    """Images in order of their path; the class index is the place of the folder's name in natural order.

    The folder is the one directly in the source, or with `config.class_folder` "last" the one that the image lies in,
    named by its whole path. Raises UserError for a file instead of a folder, a folder that cannot be read, folders
    without an image unless `config.allow_empty_classes`, folders that are no classes, and no image in any of them.
    """
    if place.pattern:
        raise UserError(f"{place} is no folder; an image folder is one that holds a sub-folder a class")
    files = files_below(place.root, is_image, progress)
    table = files.table.filter(pc.match_substring(files.table["name"], "/"))
    loose = len(files.table) - len(table)
    if not len(table):
        told = f" ({by_extension(files.left_out)})" if files.left_out else ""
        raise UserError(
            f"no images in {place}'s class folders: {files.left_out.total()} other files{told} and {loose} images "
            f"outside of any class folder found; expected {place}/<class>/<image>, {IMAGES}"
            f"{packed([entry.name for entry in entries(place.root)])}"
        )
    if loose:
        progress.warn(f"{loose} images directly in {place} have no class folder and are left out")
    folders = nesting(table["name"])
    if not config.classes:
        refuse_other_layouts(place, folders, table["name"])
    if config.class_folder is None:
        refuse_two_levels(place, folders)
    empty = sorted(files.others.keys() - {b""} - {folder.name for folder in folders})
    if config.classes:
        empty = [folder for folder in empty if as_text(folder) in config.classes]
    if empty and not config.allow_empty_classes:
        raise _empty(place, empty, files.others)
    folder = _class_folders(table["name"], config.class_folder == "last")
    names = natural([*pc.unique(folder).to_pylist(), *empty])
    labels = pc.index_in(folder, pa.array(names, pa.binary())).cast(pa.int32())
    table = table.add_column(1, "label", labels)
    return Listing(place.root, tuple(map(as_text, names)), table, "file", dict(files.left_out))


def _class_folders(names: pa.ChunkedArray, last: bool) -> pa.ChunkedArray:
    if last:
        return pc.replace_substring_regex(names, "/[^/]*$", "")
    return pc.list_element(pc.split_pattern(names, "/", max_splits=1), 0)


def _empty(place: Place, folders: Sequence[bytes], others: Mapping[bytes, Counter[str]]) -> UserError:
    told = [f"{as_text(folder)!r} ({by_extension(others[folder]) or 'no file'})" for folder in folders]
    return UserError(
        f"{len(folders)} of the folders directly in {place} hold no image: {listed(told, ', ')}; bring their images "
        f"({IMAGES}), remove them, or take them for classes without images with source.allow_empty_classes "
        "(--allow-empty-classes)"
    )
