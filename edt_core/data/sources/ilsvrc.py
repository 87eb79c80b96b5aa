"""ImageNet as its authors ship it: ILSVRC2012_img_train.tar, a tar of one tar per class, never extracted.

Format: image-net.org, ILSVRC2012: `n01440764.tar` holds `n01440764_10026.JPEG`; a class is a WordNet id (wnid).
"""

import re
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from edt_core.data.sources.files import as_text, extension, is_image, opened, some
from edt_core.data.sources.folder import list_image_folder
from edt_core.data.sources.listing import Listing, archive_table, encode_repeats
from edt_core.data.sources.places import Place, matching
from edt_core.data.sources.reading import ahead
from edt_core.data.sources.tars import BLOCK_SIZE, members
from edt_core.data.sources.walk import files_below
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.store.folder import Folder

if TYPE_CHECKING:
    from edt_core.config import SourceConfig

TRAIN_TAR = "ILSVRC2012_img_train.tar"
CLASS_TAR = re.compile(rb"(?:.*/)?(n\d{8})\.tar")
_OUTER_BLOCK = 1 << 16  # class tars are 100 MB each: only their headers are read


class ClassTar(NamedTuple):
    """The tar of one class: bytes `start` to `stop` of a file, with the store's version token for that file."""

    wnid: bytes
    file: bytes
    version: str | None
    start: int
    stop: int


def list_ilsvrc(place: Place, config: "SourceConfig", progress: Progress) -> Listing:
    """The images in order of `<wnid>/<name>`, as in the extracted folder; class index by sorted wnid.

    `place` is the train tar, a folder with it, with its class tars, or with the extracted class folders. Raises
    UserError for incomplete archives, a class that occurs twice, and tars with other content.
    """
    if not place.pattern and place.root.exists(TRAIN_TAR):
        place = Place(place.root, TRAIN_TAR, is_file=True)
    if place.pattern:
        files = matching(place, ".tar", progress)
    else:
        files = files_below(place.root, lambda name: bool(CLASS_TAR.fullmatch(name)), progress)
    if not files.table.num_rows:
        return list_image_folder(place, config, progress)
    tars: list[ClassTar] = []
    for entry in files.table.to_pylist():
        name, size, version = entry["name"], entry["size"], entry.get("version")
        if match := CLASS_TAR.fullmatch(name):
            tars.append(ClassTar(match[1], name, version, 0, size))
        elif place.is_file:
            tars += _inside(place.root, name, version, size)
    wnids = sorted(tar.wnid for tar in tars)
    if repeated := sorted({a for a, b in pairwise(wnids) if a == b}):
        raise UserError(f"{len(repeated)} classes are in {place} twice: {some(repeated)}; keep one tar of each")
    if not tars:
        raise UserError(f"no class tars such as n01440764.tar in {place}; give {TRAIN_TAR}, or a folder with it")
    tars.sort()
    tables, left_out = [], Counter[str]() + files.left_out
    for done, (table, others) in enumerate(ahead(lambda tar: _class_table(place.root, tar), tars), 1):
        left_out += others
        label = pa.repeat(pa.scalar(done - 1, pa.int32()), len(table))
        tables.append(table.set_column(1, "label", label))
        progress.update(done, len(tars), "class archives listed")
    table = encode_repeats(pa.concat_tables(tables))
    return Listing(place.root, tuple(as_text(wnid) for wnid in wnids), table, "range", dict(left_out))


def _inside(root: Folder, name: bytes, version: str | None, size: int) -> list[ClassTar]:
    """The class tars in the train tar, as ranges of it."""
    with opened(root, name, _OUTER_BLOCK) as file:
        return [
            ClassTar(match[1], name, version, member.offset, member.offset + member.size)
            for member in members(file, as_text(name), 0, size)
            if (match := CLASS_TAR.fullmatch(member.name))
        ]


def _class_table(root: Folder, tar: ClassTar) -> tuple[pa.Table, Counter[str]]:
    """The images of one class tar, sorted by name, with label 0 for now; and its other members, by extension."""
    where = f"{as_text(tar.wnid)}.tar" + ("" if CLASS_TAR.fullmatch(tar.file) else f" in {as_text(tar.file)}")
    with opened(root, tar.file, BLOCK_SIZE) as file:
        contents = sorted(members(file, where, tar.start, tar.stop))
    images = [member for member in contents if is_image(member.name)]
    others = Counter(extension(member.name) for member in contents if not is_image(member.name))
    if not images:
        raise UserError(f"no images in {where}; it should contain {as_text(tar.wnid)}_*.JPEG: download it again")
    names = [tar.wnid + b"/" + member.name for member in images]
    offsets, sizes = [member.offset for member in images], [member.size for member in images]
    return archive_table(tar.file, tar.version, names, [0] * len(images), sizes, offsets), others
