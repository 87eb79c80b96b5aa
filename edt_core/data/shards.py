"""WebDataset image shards: written with identical bytes on every run, read as arrays.

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

from edt_core.data.subsets import at_even_distances
from edt_core.data.tar_members import MemberWriter
from edt_core.errors import UserError
from edt_core.files.small_files import parse_json
from edt_core.store.layout import CLASS_MEMBER, IMAGE_MEMBERS, JSON_MEMBER


@dataclass(frozen=True)
class ImageSample:
    """One preprocessed image: its encoded bytes (S x S pixels), its class, and its original.

    `source` is the name of the original in the data source, `sha256` the hex digest of the original's bytes.
    """

    key: str
    data: bytes
    label: int
    source: str
    sha256: str

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [S, S, 3]."""
        from edt_core.data.images import decode_rgb  # Pillow is not needed for latents

        return np.asarray(decode_rgb(self.data))


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write (key, {extension: bytes}) samples as a WebDataset tar; return their number.

    Owner, mode and mtime are fixed and members sorted, so equal samples give equal bytes.
    """
    rows = 0
    with path.open("wb") as file:
        tar = MemberWriter(file)
        for key, members in samples:
            tar.write(key, members)
            rows += 1
        tar.close()
    return rows


def read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, {extension: bytes}) in the order of the file. Members are streamed, never extracted or unpickled."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    # Opened here: webdataset treats a path as a URL, and truncates it at a `#` or `?` in the name of a folder.
    with path.open("rb") as file:
        for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
            members = {name: data for name, data in sample.items() if not name.startswith("__")}
            yield sample["__key__"], members


def write_image_shard(path: Path, samples: Iterable[ImageSample], image_format: str) -> int:
    """Write an image shard; return the number of samples."""
    image_member = IMAGE_MEMBERS[image_format]

    def members(sample: ImageSample) -> dict[str, bytes]:
        record = {"label": sample.label, "sha256": sample.sha256, "source": sample.source}
        text = json.dumps(record, sort_keys=True)
        return {image_member: sample.data, CLASS_MEMBER: b"%d" % sample.label, JSON_MEMBER: text.encode()}

    return write_tar(path, ((sample.key, members(sample)) for sample in samples))


def read_image_shard(path: Path) -> Iterator[ImageSample]:
    """Yield the samples of an image shard in order, one in memory at a time.

    Raises UserError if a sample lacks a member. A truncated tar may end early silently: check the digest before or the
    number of samples after.
    """
    for key, members in read_tar(path):
        yield image_sample(key, members, path)


def image_sample(key: str, members: Mapping[str, bytes], path: Path) -> ImageSample:
    """The sample of an image shard with these members. Raises UserError if it lacks one."""
    image = next((members[name] for name in IMAGE_MEMBERS.values() if name in members), None)
    if image is None or CLASS_MEMBER not in members or JSON_MEMBER not in members:
        raise UserError(
            f"sample {key} of {path} has only the members {sorted(members)}: the file is not an image shard, or it "
            "is damaged; rerun preprocess"
        )
    record = parse_json(members[JSON_MEMBER], f"sample {key} of {path}")
    return ImageSample(key, image, int(members[CLASS_MEMBER]), record["source"], record["sha256"])


def load_images(
    paths: Iterable[Path], stated: int, limit: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load the images of the shards into memory: uint8 [N, S, S, 3] and labels int64 [N].

    Above `limit` images, `limit` of them are taken at even distances, because shards are sorted by class. Raises
    UserError if the shards do not contain `stated` images: a truncated tar may end early silently.
    """
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    count = 0
    for sample in chain.from_iterable(read_image_shard(path) for path in paths):
        if at_even_distances(count, stated, stated if limit is None else limit):
            pixels.append(sample.pixels())
            labels.append(sample.label)
        count += 1
    if count != stated:
        raise UserError(
            f"the image shards contain {count} images, but their artifact states {stated}; rerun preprocess"
        )
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array as the bytes of a `.npy` file, without pickle."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
