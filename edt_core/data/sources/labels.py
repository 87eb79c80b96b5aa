"""A folder of images and a file with the class of each: CSV, TSV, a list, JSON or JSON lines."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.classes import by_name
from edt_core.data.sources.files import as_text, extension, is_image, read_errors, shown, some
from edt_core.data.sources.listing import Listing
from edt_core.data.sources.places import Place
from edt_core.data.sources.walk import files_below
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

    If all labels are whole numbers, classes are in numeric order, otherwise in order of name. Raises UserError for a
    labels file that is missing or invalid, a listed file that does not exist, and two labels for one file.
    """
    if place.pattern:
        raise UserError(
            f"{place} is not a folder; set source.path to the folder of the images and source.labels to its labels file"
        )
    where, data = _read(place.root, config.labels)
    file_labels = _unique(parse_labels(data, where), where, place.root)
    files = files_below(place.root, lambda name: True, progress).table
    names = pa.array(list(file_labels), pa.binary())
    missing = names.filter(pc.invert(pc.is_in(names, files["name"].combine_chunks()))).to_pylist()
    if missing:
        raise UserError(
            f"{where} lists {len(file_labels)} files, and {len(missing)} of them are not in {place}: {some(missing)}; "
            "add the files or remove them from the list (source.kind=image_folder takes the classes from sub-folders "
            "instead)"
        )
    positions = pc.index_in(files["name"], names).combine_chunks()
    others = [name for name in files.filter(pc.is_null(positions))["name"].to_pylist() if as_text(name) != where]
    unlisted = [name for name in others if is_image(name)]
    if unlisted:
        progress.warn(f"{len(unlisted)} images in {place} are not in {where} and are skipped: {some(unlisted)}")
    classes, indices = by_name([as_text(_bytes(str(label))) for label in file_labels.values()], where)
    table = files.filter(pc.is_valid(positions))
    table = table.add_column(1, "label", pa.array(indices[np.asarray(positions.drop_null())]))
    left_out = Counter(extension(name) for name in others if not is_image(name))
    skipped = {f"that {where} does not list": len(unlisted)} if unlisted else {}
    return Listing(place.root, classes, table, "file", dict(left_out), skipped)


def _read(root: Folder, labels: str | None) -> tuple[str, bytes]:
    """(name for messages, bytes) of the labels file: a name inside the folder, an absolute path or a URI."""
    if labels is None:
        names = [name for name in LABEL_FILES if root.exists(name)]
        if not names:
            raise UserError(
                f"no labels file in {shown(root.uri)} ({', '.join(LABEL_FILES)}); name another one with source.labels"
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
            f"{error} (source.labels must be a name inside the folder of the images, an absolute path or a URI)"
        ) from error


def parse_labels(data: bytes, where: str) -> Pairs:
    """(file, label) of each entry. Formats: see `_SHAPES` (the last is StyleGAN's dataset.json), and CSV."""
    text = data.decode("utf-8-sig", "surrogateescape")
    name = where.lower()
    if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise UserError(f"the labels file {where} is UTF-16; convert it to UTF-8 with iconv -f utf-16 -t utf-8")
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
        raise UserError(
            f"the labels file {where} has an unsupported format; use .csv, .tsv, .txt, .json or .jsonl: convert or "
            "rename it"
        )


def _lines(text: str, where: str) -> Pairs:
    """`<file> <label>` per line, as in Caffe's lists and Places; the file may contain blanks, the label may not."""
    for number, line in enumerate(text.splitlines(), 1):
        if parts := line.rsplit(maxsplit=1):
            if len(parts) < 2:
                raise UserError(
                    f"{where}, line {number} is {line!r}; each line needs a file and a label, separated by a blank"
                )
            yield parts[0].strip(), parts[1]


def _csv(text: str, where: str, delimiter: str) -> Pairs:
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    except csv.Error as error:
        raise UserError(f"{where} is not valid CSV: {error}; correct the file") from error
    if not rows:
        return
    header = [column.strip().lower() for column in rows[0]]
    file, label = _column(header, _FILE_COLUMNS, where), _column(header, _LABEL_COLUMNS, where)
    if (file is None) != (label is None):
        raise _unknown_columns(rows[0], where)
    columns = (0, 1) if file is None or label is None else (header.index(file), header.index(label))
    first = 1 if file is None else 2
    for number, row in enumerate(rows[first - 1 :], first):
        if len(row) <= max(columns):
            raise UserError(
                f"{where}, row {number} has {len(row)} columns ({', '.join(row)}); each row needs a file and a label, "
                f"separated by {'a comma' if delimiter == ',' else 'a tab'}"
            )
        yield row[columns[0]], row[columns[1]].strip()


def _column(names: Sequence[str], candidates: Sequence[str], where: str) -> str | None:
    columns = [name for name in candidates if name in names]
    if len(columns) > 1:
        raise UserError(f"{where} has the columns {' and '.join(columns)}, but only one is expected; remove the others")
    return columns[0] if columns else None


def _unknown_columns(names: Sequence[str], where: str) -> UserError:
    return UserError(
        f"{where} has the columns {', '.join(names)}; it needs one of {', '.join(_FILE_COLUMNS)} and one of "
        f"{', '.join(_LABEL_COLUMNS)}: rename its columns "
        "(source.kind=image_folder takes the classes from sub-folders instead)"
    )


def _json(text: str, where: str) -> Any:
    return parse_json(text, where, lambda pairs: _distinct(pairs, where))


def _distinct(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    """The pairs of a JSON object as a dictionary. Raises UserError for a name with two different values."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if values.setdefault(name, value) != value:
            raise UserError(f"{where} names {name!r} twice, with {values[name]!r} and {value!r}; remove one of them")
    return values


def _shape(value: Any, where: str) -> Pairs:
    if isinstance(value, dict) and set(value) >= {"images", "annotations"}:
        raise UserError(
            f"{where} contains annotations of objects, like COCO: several classes per image. A labels file must state "
            f"one class per image; write one, {_SHAPES}"
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
        raise UserError(f"{where} contains no labels in a supported form; it must be {_SHAPES}")


def _objects(values: Sequence[Any], where: str) -> Pairs:
    for value in values:
        keys = list(value) if isinstance(value, dict) else []
        file, label = _column(keys, _FILE_COLUMNS, where), _column(keys, _LABEL_COLUMNS, where)
        if file is None or label is None:
            raise _unknown_columns(keys, where)
        yield value[file], value[label]


def _unique(pairs: Pairs, where: str, root: Folder) -> dict[bytes, str | int]:
    """The label of each file. Repeated pairs are allowed."""
    file_labels: dict[bytes, str | int] = {}
    conflicts: list[bytes] = []
    inside = None if root.local is None else f"{root.local}/"
    for file, label in pairs:
        if not isinstance(file, str) or not file or isinstance(label, bool) or not isinstance(label, str | int):
            raise UserError(
                f"{where}: {file!r} has the label {label!r}; a label must be a class name or a whole number"
            )
        if label == "":
            raise UserError(f"{where}: {file!r} has no label; add one or remove the file from the list")
        name = file.removeprefix(inside) if inside else file
        key = _bytes(name.removeprefix("./").lstrip("/"))  # Places writes /a/airfield/00000001.jpg
        if file_labels.setdefault(key, label) != label:
            conflicts.append(key)
    if conflicts:
        raise UserError(
            f"{where} gives two different labels to {len(conflicts)} files: {some(conflicts)}; keep one of them"
        )
    if not file_labels:
        raise UserError(f"{where} is empty; it must list a file and a label for each image")
    return file_labels


def _bytes(text: str) -> bytes:
    """The bytes that a text was decoded from. JSON may also contain lone surrogates, which are escaped."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")
