"""Parquet files with one image and one label per row, as Hugging Face ships its image data sets.

Format: huggingface.co/docs/datasets "Image" feature: a struct of bytes and path; its class names are in the schema's
metadata under `huggingface`.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from edt_core.data.sources.classes import by_name, by_number
from edt_core.data.sources.files import as_text, opened
from edt_core.data.sources.listing import Listing, archive_table, encode_repeats
from edt_core.data.sources.places import Place, matching, warn_of_splits
from edt_core.data.sources.reading import ahead, image_column
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.store.folder import Folder

if TYPE_CHECKING:
    from edt_core.config import SourceConfig

_MAX_ROWS = 10_000_000  # of one file: run-length encoded, a billion rows take a few bytes
_MAX_LABEL_BYTES = 4096  # of a class name in a file
_LABELS = ("label", "labels", "fine_label", "cls", "class", "class_name", "category", "target")


class _Part(NamedTuple):
    """The labels of one file: class indices or names, and the class names in its schema."""

    file: bytes
    version: str | None
    labels: pa.ChunkedArray
    names: tuple[str, ...] | None


def list_parquet(place: Place, config: "SourceConfig", progress: Progress) -> Listing:
    """The rows in order of file name, then of row; only their labels are read.

    Raises UserError for files that are not complete parquet, have no image or label column, disagree on their classes,
    or have rows without a label.
    """
    files = matching(place, ".parquet", progress)
    warn_of_splits(files.names, place, progress)
    entries = files.table.to_pylist()
    parts: list[_Part] = []
    for part in ahead(lambda entry: _part(place.root, entry["name"], entry.get("version")), entries):
        parts.append(part)
        progress.update(len(parts), len(entries), "parquet files listed")
    classes, labels = _labels(place, parts)
    tables, start = [], 0
    for part in parts:
        stop = start + len(part.labels)
        tables.append(_table(part, labels[start:stop]))
        start = stop
    table = encode_repeats(pa.concat_tables(tables))
    return Listing(place.root, classes, table, "parquet", dict(files.left_out))


def _part(root: Folder, file: bytes, version: str | None) -> _Part:
    import pyarrow.parquet as pq

    where = as_text(file)
    with opened(root, file) as source:
        try:
            parquet = pq.ParquetFile(source)
            schema = parquet.schema_arrow
            column = next((name for name in _LABELS if name in schema.names), None)
            if column is None or image_column(schema) is None:
                raise UserError(
                    f"{where} has the columns {', '.join(schema.names)}; it needs an image column (image: binary, or a "
                    f"struct with bytes) and a label column (one of {', '.join(_LABELS)})"
                )
            if (count := parquet.metadata.num_rows) > _MAX_ROWS:
                raise UserError(f"{where} has {count:,} rows, but a file may have at most {_MAX_ROWS:,}; split it")
            # Text labels as a dictionary: decoded, each row would be a copy of its name.
            labels = pq.ParquetFile(source, read_dictionary=[column]).read(columns=[column], use_threads=False)[column]
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # from the disk or the store; pyarrow's have no errno
                raise
            raise UserError(f"{where} is not a complete parquet file ({error}); copy or download it again") from error
    if pa.types.is_dictionary(labels.type):
        _check_names(labels, where)
        labels = labels.cast(labels.type.value_type)
    if labels.null_count:
        raise UserError(f"{labels.null_count} of {len(labels)} rows of {where} have no label; remove them")
    if not (pa.types.is_integer(labels.type) or _is_text(labels.type)):
        raise UserError(
            f"the label column {column!r} of {where} has the type {labels.type}; labels must be whole numbers or names"
        )
    return _Part(file, version, labels, _stated_names(schema, column))


def _check_names(labels: pa.ChunkedArray, where: str) -> None:
    """Raise UserError for names that are too long: as values of a dictionary they can be repeated in every row."""
    for chunk in labels.chunks:
        if (
            _is_text(chunk.dictionary.type)
            and (pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0) > _MAX_LABEL_BYTES
        ):
            raise UserError(
                f"{where} has labels of more than {_MAX_LABEL_BYTES:,} bytes; a label must be a class name or index"
            )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _stated_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Class names in the schema's metadata, if Hugging Face's `datasets` wrote the file."""
    try:
        metadata: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = metadata["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _labels(place: Place, parts: Sequence[_Part]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and the class index of every row of all files."""
    first = parts[0]
    for part in parts:
        if part.names != first.names or _is_text(part.labels.type) != _is_text(first.labels.type):
            raise UserError(
                f"{as_text(first.file)} and {as_text(part.file)} have different classes, so they are different data "
                "sets; give a folder or a pattern with only one of them"
            )
    if _is_text(first.labels.type):
        return by_name([label for part in parts for label in part.labels.to_pylist()], place)
    try:
        labels = np.concatenate([part.labels.cast(pa.int64()).to_numpy() for part in parts])
    except pa.ArrowInvalid as error:
        raise UserError(f"the labels in {place} cannot be class indices: {error}; correct them") from error
    return by_number(labels, first.names, place)


def _table(part: _Part, labels: np.ndarray) -> pa.Table:
    count = len(labels)
    file = pa.repeat(pa.scalar(part.file, pa.binary()), count)
    numbers = pa.array(np.arange(count)).cast(pa.string()).cast(pa.binary())
    names = pc.binary_join_element_wise(file, numbers, pa.scalar(b"#", pa.binary()))
    return archive_table(part.file, part.version, names, labels, np.zeros(count, np.int64), np.arange(count))
