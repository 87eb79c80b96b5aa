"""Existing labelled images in any supported layout: listed in a fixed order, read in slices.

`list_source` returns a `Listing`; `source_identity` returns the hash that identifies its images.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edt_core.data.sources.classes import refuse_alike, remarks, select
from edt_core.data.sources.files import as_text, is_image, opened, some
from edt_core.data.sources.folder import list_image_folder
from edt_core.data.sources.ilsvrc import CLASS_TAR, TRAIN_TAR, list_ilsvrc
from edt_core.data.sources.labels import LABEL_FILES, list_labels
from edt_core.data.sources.layouts import packed
from edt_core.data.sources.listing import (
    UNREADABLE,
    Listing,
    combine_identity,
    duplicates,
    image_digest,
    image_versions,
    listing_identity,
    source_digests,
    source_identity,
)
from edt_core.data.sources.parquet import list_parquet
from edt_core.data.sources.places import Place, expand_braces, locate
from edt_core.data.sources.reading import RawImage
from edt_core.data.sources.tars import members, refuse_compressed
from edt_core.data.sources.walk import Entry, entries, one_file
from edt_core.data.sources.webdataset import list_webdataset
from edt_core.errors import UserError
from edt_core.progress import Progress, Silent

if TYPE_CHECKING:
    from edt_core.config import SourceConfig

__all__ = [
    "UNREADABLE",
    "Listing",
    "RawImage",
    "combine_identity",
    "detect_kind",
    "image_digest",
    "image_versions",
    "list_source",
    "listing_identity",
    "remarks",
    "source_digests",
    "source_identity",
]

_LISTERS: dict[str, Callable[[Place, "SourceConfig", Progress], Listing]] = {
    "image_folder": list_image_folder,
    "labels": list_labels,
    "ilsvrc2012": list_ilsvrc,
    "webdataset": list_webdataset,
    "parquet": list_parquet,
}
_SILENT = Silent()
_PEEKED = 5  # sub-folders inspected to detect a layout


def list_source(config: "SourceConfig", progress: Progress = _SILENT) -> Listing:
    """List the images that `config` selects: those of its classes, then `limit` of them at even distances.

    Raises UserError if there is no source, no image or fewer than two classes, and for anything that would drop images
    silently: incomplete archives, unreadable folders, labels that do not match.
    """
    assert config.kind != "digits", "the digits have no files to list"
    assert config.path
    place = locate(config.path)
    refuse_compressed(str(place))
    kind = config.kind if config.kind != "auto" else detect_kind(place, config.labels)
    listing = _LISTERS[kind](place, config, progress)
    if repeated := duplicates(listing):
        raise UserError(f"{len(repeated)} names in {place} occur twice: {some(repeated)}; rename or remove one of each")
    refuse_alike(listing.classes, place)
    return select(listing, place, config.classes, config.limit)


def detect_kind(place: Place, labels: str | None = None) -> str:
    """Detect the layout of a place by the first rule that matches:

    1. a file or a pattern, by its extension: `.parquet` -> parquet; `.tar` -> ilsvrc2012 if it is a class tar
       (n01440764.tar) or its first member is one, else webdataset;
    2. `source.labels` is set -> labels;
    3. a folder with ILSVRC2012_img_train.tar or class tars -> ilsvrc2012;
    4. with any other `.tar`, in it or in its first sub-folder with files -> webdataset; with `.parquet` -> parquet;
    5. with labels.csv, labels.json, metadata.csv, metadata.jsonl or dataset.json -> labels;
    6. with sub-folders -> image_folder.

    Raises UserError if no rule matches, or if the folder contains both archives and image files.
    """
    if place.pattern:
        return _kind_of_file(place)
    if labels:
        return "labels"
    contents = entries(place.root)
    files = [entry.name for entry in contents if not entry.is_folder]
    if any(CLASS_TAR.fullmatch(name) or name == TRAIN_TAR.encode() for name in files):
        return "ilsvrc2012"
    folders = [entry for entry in contents if entry.is_folder]
    inside = [entry.name for entry in _peek(place, folders)]
    if kind := _kind_by_extension(files) or _kind_by_extension(inside):
        if images := sum(map(is_image, [*files, *inside])):
            raise UserError(
                f"{place} contains both {'.tar archives' if kind == 'webdataset' else '.parquet files'} and image "
                f"files ({images} in the folders inspected); choose the images to train on with source.kind (--kind): "
                f"{kind}, image_folder or labels"
            )
        return kind
    if any(as_text(name) in LABEL_FILES for name in files):
        return "labels"
    if folders:
        return "image_folder"
    for name in files:
        refuse_compressed(as_text(name))
    images = sum(map(is_image, files))
    if images:
        raise UserError(
            f"{images} images are directly in {place}, and nothing states their classes; put the images of each class "
            f"into a separate sub-folder, or write {LABEL_FILES[0]} with the columns file_name,label (for images "
            "without labels: docs/data.md, Images without labels)"
        )
    raise UserError(
        f"no images in {place}: {len(files)} other files and 0 class folders found ({some(files)}); "
        "give a folder with one sub-folder per class, a folder with labels.csv, tar archives or parquet files"
        f"{packed(files)}"
    )


def _kind_of_file(place: Place) -> str:
    name = expand_braces(place.pattern)[0]
    refuse_compressed(name)
    if name.endswith(".parquet"):
        return "parquet"
    if not name.endswith(".tar"):
        raise UserError(
            f"{place} is neither .tar nor .parquet; give a folder of images, archives or parquet files (for a labels "
            "file set source.labels, and source.path to its folder)"
        )
    if CLASS_TAR.fullmatch(name.encode("utf-8", "surrogateescape")) or name.endswith(TRAIN_TAR):
        return "ilsvrc2012"
    if not place.is_file:
        return "webdataset"
    encoded = os.fsencode(place.pattern)
    size = one_file(place.root, encoded).table["size"][0].as_py()
    with opened(place.root, encoded, 1 << 16) as file:
        first = next(members(file, as_text(encoded), 0, size), None)
    return "ilsvrc2012" if first and CLASS_TAR.fullmatch(first.name) else "webdataset"


def _kind_by_extension(names: Sequence[bytes]) -> str | None:
    if any(name.lower().endswith(b".tar") for name in names):
        return "webdataset"
    return "parquet" if any(name.lower().endswith(b".parquet") for name in names) else None


def _peek(place: Place, folders: Sequence[Entry]) -> list[Entry]:
    """The files in the first sub-folder that has any, or in one of its sub-folders."""
    for folder in folders[:_PEEKED]:
        contents = entries(place.root, folder.name)
        files = [entry for entry in contents if not entry.is_folder]
        files = files or _peek(place, [entry for entry in contents if entry.is_folder])
        if files:
            return files
    return []
