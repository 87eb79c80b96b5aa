"""WebDataset image shards: written byte for byte the same on every run, read as arrays.

Format: WebDataset tar (github.com/webdataset/webdataset): the members of a sample share the name before the first dot.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.data.images import decode_rgb
from edt_core.data.order import at_even_distances
from edt_core.errors import UserError
from edt_core.files.small_files import parse_json
from edt_core.store.layout import CLASS_MEMBER, IMAGE_MEMBERS, JSON_MEMBER


@dataclass(frozen=True)
class ImageSample:
    """One preprocessed image: its encoded bytes (S x S pixels), its class, and what it was made from.

    `source` is the name of the original in its source, `sha256` the hex digest of the original's bytes.
    """

    key: str
    data: bytes
    label: int
    source: str
    sha256: str

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [S, S, 3]."""
        return np.asarray(decode_rgb(self.data))


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write (key, {extension: bytes}) samples as a WebDataset tar; returns their number.

    Owner, mode and mtime are fixed and members sorted, so equal samples give equal bytes.
    """
    from webdataset import TarWriter

    rows = 0
    with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
            rows += 1
    return rows


def read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, {extension: bytes}) in the order of the file. Members are streamed, never extracted or unpickled."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    # Opened here: webdataset takes a path for a URL, and cuts it at a `#` or `?` in the name of a folder.
    with path.open("rb") as file:
        for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
            members = {name: data for name, data in sample.items() if not name.startswith("__")}
            yield sample["__key__"], members


def write_image_shard(path: Path, samples: Iterable[ImageSample], image_format: str) -> int:
    """Write an image shard; returns the number of samples."""
    image_member = IMAGE_MEMBERS[image_format]

    def members(sample: ImageSample) -> dict[str, bytes]:
        about = {"label": sample.label, "sha256": sample.sha256, "source": sample.source}
        text = json.dumps(about, sort_keys=True)
        return {image_member: sample.data, CLASS_MEMBER: b"%d" % sample.label, JSON_MEMBER: text.encode()}

    return write_tar(path, ((sample.key, members(sample)) for sample in samples))


def read_image_shard(path: Path) -> Iterator[ImageSample]:
    """Yield the samples of an image shard in order, one in memory at a time.

    Raises UserError where a sample lacks a member. A tar that was cut may end early silently: check the digest before
    or the number of samples after.
    """
    for key, members in read_tar(path):
        image = next((members[name] for name in IMAGE_MEMBERS.values() if name in members), None)
        if image is None or CLASS_MEMBER not in members or JSON_MEMBER not in members:
            raise UserError(
                f"sample {key} of {path} has only the members {sorted(members)}: it is no image shard, or damaged; "
                "run preprocess again"
            )
        about = parse_json(members[JSON_MEMBER], f"sample {key} of {path}")
        yield ImageSample(key, image, int(members[CLASS_MEMBER]), about["source"], about["sha256"])


def load_images(
    paths: Iterable[Path], stated: int, limit: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images of the shards in memory: uint8 [N, S, S, 3] and labels int64 [N].

    Above `limit` images, that many are taken at even distances: shards are sorted by class. Raises UserError if the
    shards do not hold the `stated` number: a tar that was cut reads short silently.
    """
    wanted = stated if limit is None else limit
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    found = 0
    for sample in chain.from_iterable(read_image_shard(path) for path in paths):
        if at_even_distances(found, stated, wanted):
            pixels.append(sample.pixels())
            labels.append(sample.label)
        found += 1
    if found != stated:
        raise UserError(f"the image shards hold {found} images where {stated} are stated; run preprocess again")
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array as the bytes of a `.npy` file, without pickle."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
