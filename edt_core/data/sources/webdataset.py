"""WebDataset shards: tars in which the members of a sample are adjacent and share the name before the first dot.

Format: github.com/webdataset/webdataset, "The WebDataset Format". Members are located, never extracted or unpickled.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from edt_core.data.images import image_extensions
from edt_core.data.sources.classes import by_number
from edt_core.data.sources.files import IMAGES, as_text, opened, some
from edt_core.data.sources.listing import Listing, archive_table, encode_repeats
from edt_core.data.sources.places import Place, matching, warn_of_splits
from edt_core.data.sources.reading import ahead
from edt_core.data.sources.tars import BLOCK_SIZE, Member, members
from edt_core.errors import UserError
from edt_core.files.small_files import parse_json
from edt_core.progress import Progress
from edt_core.store.folder import Folder
from edt_core.store.layout import CLASS_MEMBER, CLASSES_NAME, JSON_MEMBER

if TYPE_CHECKING:
    from edt_core.config import SourceConfig

_PICKLES = (b"pyd", b"pkl", b"pickle", b"pth", b"pt")
_MAX_LABEL_BYTES = 1 << 20


class _Sample(NamedTuple):
    key: bytes
    image: Member | None
    label: int | None


class _Shard(NamedTuple):
    table: pa.Table
    keys: list[bytes]
    without_image: list[bytes]
    without_label: list[bytes]
    left_out: Counter[str]  # members that are neither image nor label, by extension


def list_webdataset(place: Place, config: "SourceConfig", progress: Progress) -> Listing:
    """The samples in order of shard name, then of position. Class names come from classes.json next to the shards.

    Raises UserError for incomplete archives, members that would have to be unpickled, samples without an image or a
    label, and keys that occur twice.
    """
    files = matching(place, ".tar", progress)
    warn_of_splits(files.names, place, progress)
    entries = files.table.to_pylist()
    shards: list[_Shard] = []
    for shard in ahead(lambda entry: _shard(place.root, entry), entries):
        shards.append(shard)
        progress.update(len(shards), len(entries), "archives listed")
    _refuse(place, shards)
    table = encode_repeats(pa.concat_tables([shard.table for shard in shards]))
    names = _class_names(place.root, files.names)
    classes, labels = by_number(np.asarray(table["label"]), names, place)
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels))
    beside = files.left_out - Counter({".json": 1} if names is not None else {})
    left_out = sum((shard.left_out for shard in shards), beside)
    return Listing(place.root, classes, table, "range", dict(left_out))


def _shard(root: Folder, entry: dict[str, Any]) -> _Shard:
    name, size = entry["name"], entry["size"]
    with opened(root, name, BLOCK_SIZE) as file:
        samples = list(_samples(file, as_text(name), size, left_out := Counter[str]()))
    whole = [(s.key, s.image, s.label) for s in samples if s.image is not None and s.label is not None]
    table = archive_table(
        name,
        entry.get("version"),
        [image.name for _, image, _ in whole],
        np.array([label for _, _, label in whole], dtype=np.int32),
        [image.size for _, image, _ in whole],
        [image.offset for _, image, _ in whole],
    )
    without_image = [s.key for s in samples if s.image is None]
    without_label = [s.key for s in samples if s.label is None]
    return _Shard(table, [s.key for s in samples], without_image, without_label, left_out)


def _samples(file: BinaryIO, where: str, size: int, left_out: Counter[str]) -> Iterator[_Sample]:
    def located() -> Iterator[tuple[bytes, bytes, Member, int | None]]:
        """(key, extension, member, label if the member states one). Label members are read during the scan."""
        for member in members(file, where, 0, size):
            folder, slash, base = member.name.rpartition(b"/")
            stem, _, extension = base.lower().partition(b".")
            if extension.rsplit(b".", 1)[-1] in _PICKLES:
                raise UserError(
                    f"{as_text(member.name)!r} in {where} is a pickle, which can run arbitrary code when it is read; "
                    "remove such members from the archive"
                )
            label = None
            if extension in (CLASS_MEMBER.encode(), JSON_MEMBER.encode()):
                file.seek(member.offset)
                label = _label(extension, file.read(min(member.size, _MAX_LABEL_BYTES)), member, where)
            elif not _is_image(extension):
                left_out[f".{as_text(extension)}"] += 1
            yield folder + slash + base[: len(stem)], extension, member, label

    for key, group in groupby(located(), key=lambda part: part[0]):
        parts = list(group)
        images = [member for _, extension, member, _ in parts if _is_image(extension)]
        if len(images) > 1:
            raise UserError(
                f"the sample {as_text(key)!r} in {where} has {len(images)} images "
                f"({some([image.name for image in images])}); keep one of them, and each key once"
            )
        labels = {extension: label for _, extension, _, label in parts if label is not None}
        if len(set(labels.values())) > 1:
            raise UserError(
                f"the sample {as_text(key)!r} in {where} has the labels {' and '.join(map(str, labels.values()))} in "
                "its .cls and .json members; remove the one that is wrong"
            )
        label = next(iter(labels.values()), None)
        yield _Sample(key, images[0] if images else None, label)


def _is_image(extension: bytes) -> bool:
    return f".{as_text(extension)}" in image_extensions()


def _label(extension: bytes, data: bytes, member: Member, where: str) -> int | None:
    """The class index in a `.cls` or `.json` member; None for JSON without one."""
    try:
        value = int(data) if extension == CLASS_MEMBER.encode() else json.loads(data)
        if isinstance(value, dict):
            value = value.get("label")
    except (ValueError, RecursionError):
        value = data[:40]
    if value is None and extension == JSON_MEMBER.encode():
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 31) <= value < 1 << 31:
        raise UserError(
            f"{as_text(member.name)!r} in {where} contains {value!r}, which is not a class index: a .cls member is a "
            'whole number, a .json member an object with a whole number as "label"'
        )
    return value


def _refuse(place: Place, shards: Sequence[_Shard]) -> None:
    keys = sorted(key for shard in shards for key in shard.keys)
    if repeated := [a for a, b in pairwise(keys) if a == b]:
        raise UserError(
            f"{len(repeated)} of {len(keys)} keys in {place} occur twice: {some(repeated)}; a key must be unique in "
            "the whole source, and the members of a sample must be adjacent"
        )
    for what, incomplete in (
        (f"image ({IMAGES})", [key for shard in shards for key in shard.without_image]),
        ('label (.cls, or .json with a number as "label")', [key for shard in shards for key in shard.without_label]),
    ):
        if incomplete:
            raise UserError(
                f"{len(incomplete)} of {len(keys)} samples in {place} have no {what}: {some(incomplete)}; complete or "
                "remove them"
            )


def _class_names(root: Folder, files: Sequence[bytes]) -> tuple[str, ...] | None:
    """The class names in classes.json next to the shards, or None if there is no such file."""
    folders = sorted({file.rpartition(b"/")[0] for file in files})
    for folder in map(as_text, folders):
        name = f"{folder}/{CLASSES_NAME}" if folder else CLASSES_NAME
        if not root.exists(name):
            continue
        names = parse_json(root.read_bytes(name), f"{name} next to the archives")
        if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
            raise UserError(f"{name} next to the archives is not a list of class names; correct or remove it")
        return tuple(names)
    return None
