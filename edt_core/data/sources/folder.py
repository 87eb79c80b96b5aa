"""An image folder: `root/<class>/**/<image>`."""

import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.files import EXTENSIONS, as_text, files_below, is_image
from edt_core.data.sources.listing import Listing
from edt_core.data.sources.places import Place
from edt_core.errors import UserError
from edt_core.progress import Progress

_SPLITS = {b"train", b"training", b"val", b"valid", b"validation", b"test", b"testing"}


def list_image_folder(place: Place, progress: Progress) -> Listing:
    """Images in order of their path; the class index is the place of the sub-folder's name in sorted order.

    Raises UserError for a file instead of a folder, a sub-folder that cannot be read, and no image in any sub-folder.
    """
    if place.pattern:
        raise UserError(f"{place} is no folder; an image folder is one that holds a sub-folder a class")
    files = files_below(place.root, is_image, progress)
    in_class = pc.match_substring(files.table["name"], "/")
    table = files.table.filter(in_class)
    loose = len(files.table) - len(table)
    if not len(table):
        raise UserError(
            f"no images in {place}'s class folders: {files.others} other files and {loose} images outside of any class "
            f"folder found; expected {place}/<class>/<image> with one of the extensions {', '.join(EXTENSIONS)}"
        )
    if loose:
        progress.warn(f"{loose} images directly in {place} have no class folder and are left out")
    folders = pc.list_element(pc.split_pattern(table["name"], "/", max_splits=1), 0)
    names = sorted(pc.unique(folders).to_pylist())
    if {name.lower() for name in names} <= _SPLITS and pc.all(pc.match_substring_regex(table["name"], "/.*/")).as_py():
        listed = ", ".join(map(as_text, names))
        raise UserError(
            f"the sub-folders of {place} are splits ({listed}), not classes; give one of them, as "
            f"{place}/{as_text(names[0])}"
        )
    labels = pc.index_in(folders, pa.array(names, pa.binary())).cast(pa.int32())
    table = table.add_column(1, "label", labels)
    return Listing(place.root, tuple(map(as_text, names)), table, "file")
