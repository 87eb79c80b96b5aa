"""Detects folders whose sub-folders are not classes: splits, parts of a data set, packed formats."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.files import as_text, some
from edt_core.data.sources.places import Place
from edt_core.data.tables import MappedTable
from edt_core.errors import UserError

_SPLIT = re.compile(
    r"(train(ing|_?val)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?|pred(iction)?|holdout|query|gallery"
    r"|unlabell?ed|extra)(set|data)?\d*",
    re.IGNORECASE,
)
_FILLER = re.compile(r"\d*|(data)?set|data|images?|imgs?|large|small|standard|std|seg|single|raw|full", re.IGNORECASE)
_PART = re.compile(
    r"images?\d*|imgs?|jpe?gs?|pngs?|jpegimages|photos?|annotations?|labels?|masks?|trimaps?|bbox(es)?|meta(data)?"
    r"|segmentations?|segmentation(class|object)|segmim|imagesets?|ground_?truth|gt|thumb(nail)?s?",
    re.IGNORECASE,
)
# Image formats of other programs that are not read: pattern of file names, and the description for messages.
_PACKED = (
    (r"data_batch_\d+(\.bin)?|test_batch(\.bin)?|(coarse|fine)_label_names(\.txt)?", "batches of CIFAR"),
    (r".*\.bin", "binary files like those of STL-10"),
    (r".*-ubyte(\.gz)?", "IDX files like those of MNIST"),
    (r".*\.(npz|npy)", "NumPy arrays"),
    (r".*\.mat", "MATLAB files"),
    (r".*\.(h5|hdf5|hdf)", "HDF5 files"),
    (r".*\.(pkl|pickle|pt|pth)", "pickles"),
    (r".*\.(tfrecords?|tfrecord-.*|rec|beton|mds)", "records of another loader"),
    (r".*\.(mdb|lmdb)", "an LMDB database"),
    (r".*\.(zip|7z|rar)", "archives that are not tar"),
)


class Nested(NamedTuple):
    """A folder directly in the source: its number of images, and the folders right below it that contain them."""

    name: bytes
    images: int
    inner: tuple[bytes, ...]
    direct: int


def nesting(rows: MappedTable) -> list[Nested]:
    """The folders directly in a source, sorted, from the names of its images (binary, each `<folder>/.../<file>`)."""
    counts: dict[bytes, Counter[bytes]] = {}
    for batch in rows.batches("name"):
        parts = pc.split_pattern(batch.column(0), b"/", max_splits=2)
        first = pc.list_element(parts, 0).cast(pa.binary())
        second = pc.if_else(pc.greater(pc.list_value_length(parts), 2), pc.list_element(parts, 1), pa.scalar(b""))
        grouped = pa.table({"first": first, "second": second}).group_by(["first", "second"])
        for row in grouped.aggregate([([], "count_all")]).to_pylist():
            counts.setdefault(row["first"], Counter())[row["second"]] += row["count_all"]
    return [
        Nested(name, sum(inner.values()), tuple(sorted(key for key in inner if key)), inner[b""])
        for name, inner in sorted(counts.items())
    ]


def refuse_other_layouts(place: Place, folders: Sequence[Nested], images: pa.ChunkedArray) -> None:
    """Raise UserError if the folders directly in a source are not classes; the message names the folder to use instead.

    Such folders are splits (ImageNet from Kaggle, COCO), parts of a data set side by side (images and annotations),
    or one folder around the class folders. `images`: names of the images, sorted.
    """
    names = [as_text(folder.name) for folder in folders]
    deeper = [folder for folder in folders if len(folder.inner) > 1]
    splits = [folder for folder in deeper if _is_split(as_text(folder.name)) and not folder.direct]
    what = "splits" if all(map(_is_split, names)) else "parts"
    below = as_text(_preferred(deeper).name) if deeper else ""
    if all(_is_split(name) or _PART.fullmatch(name) for name in names) and (deeper or len(names) > 1):
        problem = f"the folders of {place} with images ({some(names)}) are {what} of a data set, not classes"
    elif len(splits) > 1:
        shown = some([folder.name for folder in splits])
        problem = f"folders of {place} ({shown}) contain folders of images and are named like the splits of a data set"
        below = as_text(_preferred(splits).name)
    elif len(folders) == 1 and (below := as_text(_common_folder(images))):
        problem = f"all images in {place} are in several folders below its folder {below!r}"
    else:
        return
    remedy = (
        f"give the folder that contains the class folders, such as {place}/{below}"
        if below
        else "nothing states the classes of their images: write labels.csv with the columns file_name,label, or sort "
        "the images into one folder per class"
    )
    raise UserError(f"{problem}; {remedy} (if these folders are classes, name them with source.classes)")


def _is_split(name: str) -> bool:
    """Whether a folder is named like a split: `train`, `val2017`, `test_set`, `seg_pred`."""
    words = [word for word in re.split(r"[-_ .]", name) if not _FILLER.fullmatch(word)]
    return bool(words) and all(map(_SPLIT.fullmatch, words))


def _common_folder(images: pa.ChunkedArray) -> bytes:
    """The deepest folder that all of these sorted names are in, if their folders differ below it; else empty."""
    first, last = (images[place].as_py().split(b"/")[:-1] for place in (0, len(images) - 1))
    common = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    return b"/".join(common) if len(common) < max(len(first), len(last)) else b""


def _preferred(folders: Sequence[Nested]) -> Nested:
    """The folder to train on: the first named train..., or else the one with the most images."""
    return max(folders, key=lambda folder: (folder.name.lower().startswith(b"train"), folder.images))


def refuse_two_levels(place: Place, folders: Sequence[Nested]) -> None:
    """Raise UserError if every folder contains only folders of images: either level could be the classes."""
    if folders and all(len(folder.inner) > 1 and not folder.direct for folder in folders):
        inner = sum(len(folder.inner) for folder in folders)
        first = folders[0]
        raise UserError(
            f"the {len(folders)} folders of {place} contain {inner} folders of images, such as "
            f"{as_text(first.name)}/{as_text(first.inner[0])}, and either level could be the classes; choose with "
            "source.class_folder (--class-folder): first for the outer folders, last for those that contain the images"
        )


def packed(names: Sequence[bytes]) -> str:
    """The remedy for files that contain images in an unsupported format; empty if there are none."""
    for pattern, description in _PACKED:
        count = sum(bool(re.fullmatch(pattern, as_text(name), re.IGNORECASE)) for name in names)
        if count:
            return (
                f". {count} of the files are {description}, which are not supported: use the data set as Parquet "
                "files (the Hugging Face Hub has the well-known ones), or write its images as files, one folder per "
                "class"
            )
    return ""
