"""WebDataset image shards: written byte for byte the same on every run, read as arrays.

Format: WebDataset tar (github.com/webdataset/webdataset): the members of a sample share the name before the first dot.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edt_core.data.images import decode_rgb
from edt_core.errors import UserError
from edt_core.schema import CLASS_MEMBER, IMAGE_MEMBER, JSON_MEMBER


@dataclass(frozen=True)
class ImageSample:
    """One preprocessed image: PNG bytes of size S x S, its class, and the path it came from."""

    key: str
    png: bytes
    label: int
    source: str

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [S, S, 3]."""
        return np.asarray(decode_rgb(self.png))


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
    from webdataset import WebDataset

    for sample in WebDataset(str(path), shardshuffle=False, empty_check=False):
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        yield sample["__key__"], members


def write_image_shard(path: Path, samples: Iterable[ImageSample]) -> int:
    """Write an image shard; returns the number of samples."""

    def members(sample: ImageSample) -> dict[str, bytes]:
        about = json.dumps({"label": sample.label, "source": sample.source}, sort_keys=True)
        return {IMAGE_MEMBER: sample.png, CLASS_MEMBER: b"%d" % sample.label, JSON_MEMBER: about.encode()}

    return write_tar(path, ((sample.key, members(sample)) for sample in samples))


def read_image_shard(path: Path) -> Iterator[ImageSample]:
    """Yield the samples of an image shard in order."""
    for key, members in read_tar(path):
        about = json.loads(members[JSON_MEMBER])
        yield ImageSample(key, members[IMAGE_MEMBER], int(members[CLASS_MEMBER]), str(about["source"]))


def load_images(paths: Iterable[Path], expected: int, limit: int | None = None) -> tuple[NDArray, NDArray]:
    """Every image of the shards (or the first `limit`) in memory: uint8 [N, S, S, 3] and labels int64 [N].

    Raises UserError if the shards do not hold the `expected` number: a short tar reads short in silence.
    """
    wanted = expected if limit is None else min(limit, expected)
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for path in paths:
        if len(pixels) == wanted:
            break
        for sample in read_image_shard(path):
            pixels.append(sample.pixels())
            labels.append(sample.label)
            if len(pixels) == wanted:
                break
    if len(pixels) != wanted:
        raise UserError(
            f"the image shards hold {len(pixels)} images where {wanted} are stated; run preprocess again"
        )
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)


def npy_bytes(array: NDArray) -> bytes:
    """An array as the bytes of a `.npy` file, without pickle."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
