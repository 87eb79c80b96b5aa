"""A folder of images and a file that says which class each of them has: CSV, TSV, a list, JSON or JSON lines."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.classes import by_name
from edt_core.data.sources.files import as_text, extension, files_below, is_image, read_errors, shown, some
from edt_core.data.sources.listing import Listing
from edt_core.data.sources.places import Place
from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.files.small_files import MAX_LABELS_BYTES, parse_json
from edt_core.progress import Progress
from edt_core.store.folder import Folder

if TYPE_CHECKING:
    from edt_core.config import SourceConfig

LABEL_FILES = ("labels.csv", "labels.json", "metadata.csv", "metadata.jsonl", "dataset.json")
_FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")
_LABEL_COLUMNS = ("label", "class", "class_name", "category")
_SHAPES = (
    'one of {"file": label}, [["file", label], ...], [{"file_name": ..., "label": ...}, ...] and '
    '{"labels": [[file, label], ...]}'
)

Pairs = Iterator[tuple[Any, Any]]


def list_labels(place: Place, config: "SourceConfig", progress: Progress) -> Listing:
    """The images that the labels file names, in order of their names.

    Labels that are all whole numbers keep their order as classes, others are sorted names. Raises UserError for a
    labels file that is missing or not understood, a file that it lists and that is not there, and two labels for one.
    """
    if place.pattern:
        raise UserError(f"{place} is no folder; give the folder of the images and its labels file as source.labels")
    where, data = _read(place.root, config.labels)
    given = _unique(parse_labels(data, where), where, place.root)
    files = files_below(place.root, lambda name: True, progress).table
    names = pa.array(list(given), pa.binary())
    missing = names.filter(pc.invert(pc.is_in(names, files["name"].combine_chunks()))).to_pylist()
    if missing:
        raise UserError(
            f"{where} lists {len(given)} files, and {len(missing)} of them are not in {place}: {some(missing)}; bring "
            "them or take them off the list (source.kind=image_folder takes the classes from sub-folders instead)"
        )
    places = pc.index_in(files["name"], names).combine_chunks()
    others = [name for name in files.filter(pc.is_null(places))["name"].to_pylist() if as_text(name) != where]
    unlisted = [name for name in others if is_image(name)]
    if unlisted:
        progress.warn(f"{len(unlisted)} images in {place} are not in {where} and are left out: {some(unlisted)}")
    classes, indices = by_name([as_text(_bytes(str(label))) for label in given.values()], where)
    table = files.filter(pc.is_valid(places))
    table = table.add_column(1, "label", pa.array(indices[np.asarray(places.drop_null())]))
    left_out = Counter(extension(name) for name in others if not is_image(name))
    return Listing(place.root, classes, table, "file", dict(left_out))


def _read(root: Folder, labels: str | None) -> tuple[str, bytes]:
    """(Name for messages, bytes) of the labels file: a name inside the folder, an absolute path or a URI."""
    if labels is None:
        names = [name for name in LABEL_FILES if root.exists(name)]
        if not names:
            raise UserError(
                f"no labels file in {shown(root.uri)}: looked for {', '.join(LABEL_FILES)}; name it with source.labels"
            )
        labels = names[0]
    outside = "://" in labels or typed_path(labels).is_absolute()
    folder, name = root, labels
    if outside:
        parent, _, name = Folder.at(labels).uri.rpartition("/")
        folder = Folder(parent or "/")
    where = shown(labels)
    try:
        with read_errors(f"{folder.uri}/{name}"):
            return where, folder.read_bytes(name, MAX_LABELS_BYTES)
    except UserError as error:
        raise UserError(
            f"{error} (source.labels is a name inside the folder of the images, an absolute path or a URI)"
        ) from error


def parse_labels(data: bytes, where: str) -> Pairs:
    """(file, label) of each entry. Formats: see `_SHAPES` (the last is StyleGAN's dataset.json), and CSV."""
    text = data.decode("utf-8-sig", "surrogateescape")
    name = where.lower()
    if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise UserError(f"the labels file {where} is UTF-16; save it as UTF-8, as by iconv -f utf-16 -t utf-8")
    if name.endswith(".csv"):
        yield from _csv(text, where, ",")
    elif name.endswith(".tsv"):
        yield from _csv(text, where, "\t")
    elif name.endswith(".txt"):
        yield from _lines(text, where)
    elif name.endswith((".jsonl", ".ndjson")):
        lines = [_json(line, f"{where}, line {k}") for k, line in enumerate(text.splitlines(), 1) if line.strip()]
        yield from _objects(lines, where)
    elif name.endswith(".json"):
        yield from _shape(_json(text, where), where)
    else:
        raise UserError(f"the labels file {where} is none of .csv, .tsv, .txt, .json and .jsonl; convert or rename it")


def _lines(text: str, where: str) -> Pairs:
    """`<file> <label>` a line, as Caffe's lists and Places have it; the file may hold blanks, the label may not."""
    for number, line in enumerate(text.splitlines(), 1):
        if parts := line.rsplit(maxsplit=1):
            if len(parts) < 2:
                raise UserError(
                    f"{where}, line {number} is {line!r}: a file and a label are needed, with a blank between"
                )
            yield parts[0].strip(), parts[1]


def _csv(text: str, where: str, delimiter: str) -> Pairs:
    try:
        found = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    except csv.Error as error:
        raise UserError(f"{where} is not a whole CSV file: {error}; mend it") from error
    if not found:
        return
    header = [column.strip().lower() for column in found[0]]
    file, label = _column(header, _FILE_COLUMNS, where), _column(header, _LABEL_COLUMNS, where)
    if (file is None) != (label is None):
        raise _unknown_columns(found[0], where)
    columns = (0, 1) if file is None or label is None else (header.index(file), header.index(label))
    first = 1 if file is None else 2
    for number, row in enumerate(found[first - 1 :], first):
        if len(row) <= max(columns):
            raise UserError(
                f"{where}, row {number} has {len(row)} columns ({', '.join(row)}): a file and a label are needed, "
                f"separated by {'a comma' if delimiter == ',' else 'a tab'}"
            )
        yield row[columns[0]], row[columns[1]].strip()


def _column(names: Sequence[str], known: Sequence[str], where: str) -> str | None:
    found = [name for name in known if name in names]
    if len(found) > 1:
        raise UserError(f"{where} has the columns {' and '.join(found)}, and only one is expected; remove the others")
    return found[0] if found else None


def _unknown_columns(names: Sequence[str], where: str) -> UserError:
    return UserError(
        f"{where} has the columns {', '.join(names)}; one of {', '.join(_FILE_COLUMNS)} and one of "
        f"{', '.join(_LABEL_COLUMNS)} are needed: rename the ones that are meant "
        "(source.kind=image_folder takes the classes from sub-folders instead)"
    )


def _json(text: str, where: str) -> Any:
    return parse_json(text, where, lambda pairs: _distinct(pairs, where))


def _distinct(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    """The pairs of a JSON object, of which Python alone would keep the last of those with one name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise UserError(f"{where} names {name!r} twice, with {found[name]!r} and {value!r}; remove one of them")
    return found


def _shape(value: Any, where: str) -> Pairs:
    if isinstance(value, dict) and set(value) >= {"images", "annotations"}:
        raise UserError(
            f"{where} has the annotations of objects in images, as COCO does: several classes an image. A labels file "
            f"says one class for each image; write one, {_SHAPES}"
        )
    if isinstance(value, dict) and set(value) >= {"labels"} and not isinstance(value["labels"], str | int):
        value = value["labels"]
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        yield from _objects(value, where)
    elif isinstance(value, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in value):
        yield from ((file, label) for file, label in value)
    else:
        raise UserError(f"{where} holds no labels in a known form; it is {_SHAPES}")


def _objects(values: Sequence[Any], where: str) -> Pairs:
    for value in values:
        keys = list(value) if isinstance(value, dict) else []
        file, label = _column(keys, _FILE_COLUMNS, where), _column(keys, _LABEL_COLUMNS, where)
        if file is None or label is None:
            raise _unknown_columns(keys, where)
        yield value[file], value[label]


def _unique(pairs: Pairs, where: str, root: Folder) -> dict[bytes, str | int]:
    """label of each file; the same pair twice counts once."""
    given: dict[bytes, str | int] = {}
    twice: list[bytes] = []
    inside = None if root.local is None else f"{root.local}/"
    for file, label in pairs:
        if not isinstance(file, str) or not file or isinstance(label, bool) or not isinstance(label, str | int):
            raise UserError(f"{where}: {file!r} has the label {label!r}; a label is a class name or a whole number")
        if label == "":
            raise UserError(f"{where}: {file!r} has no label; give it one or take it off the list")
        name = file.removeprefix(inside) if inside else file
        key = _bytes(name.removeprefix("./").lstrip("/"))  # Places writes /a/airfield/00000001.jpg
        if given.setdefault(key, label) != label:
            twice.append(key)
    if twice:
        raise UserError(f"{where} gives two different labels to {len(twice)} files: {some(twice)}; keep one of them")
    if not given:
        raise UserError(f"{where} is empty: it has to list a file and a label for each image")
    return given


def _bytes(text: str) -> bytes:
    """The bytes that a text was read from; JSON can also spell characters that are none (lone surrogates)."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")
