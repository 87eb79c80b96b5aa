"""One image shard: its plan, how its images are made or copied from earlier shards, and the report beside it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.config import PreprocessConfig
from edt_core.data.images import center_crop, decode_rgb, encode_image
from edt_core.data.shards import ImageSample, write_image_shard
from edt_core.data.sources import UNREADABLE, Listing, RawImage, image_digest, image_versions
from edt_core.data.sources.files import as_text
from edt_core.data.sources.reading import rows
from edt_core.store.artifact import ArtifactWriter
from edt_core.store.layout import IMAGE_SHARD, REPORT_OF_SHARD
from jobs.stages.reuse.images import EarlierImages, EarlierRows, positions_to_read
from jobs.stages.reuse.siblings import WrongRowError


def shard_files(number: int) -> tuple[str, str]:
    """The names of a shard and of the report beside it."""
    name = IMAGE_SHARD.format(number)
    return name, REPORT_OF_SHARD.format(name)


@dataclass(frozen=True)
class ShardPlan:
    """The content of one shard: a slice of the listing that begins at image `first`."""

    index: int
    first: int
    listing: Listing
    earlier: EarlierImages | None = None  # where images of it are in artifacts that were made before

    @property
    def name(self) -> str:
        return shard_files(self.index)[0]

    @property
    def report(self) -> str:
        return shard_files(self.index)[1]


@dataclass
class ShardReport:
    """The outcome of a shard: rows, (position, name, reason) of quarantined images, sha256 of every original.

    versions: of a remote source, `image_versions` of every original.
    """

    rows: int
    quarantined: list[tuple[int, str, str]]
    digests: bytes
    versions: bytes = b""
    processed: int = 0  # originals, if their digests are elsewhere

    @property
    def reasons(self) -> list[tuple[str, str]]:
        return [(name, reason) for _, name, reason in self.quarantined]

    @property
    def num_processed(self) -> int:
        return len(self.digests) // len(UNREADABLE) or self.processed

    def without_digests(self) -> "ShardReport":
        """The report without what grows with the number of images."""
        return ShardReport(self.rows, self.quarantined, b"", processed=self.num_processed)

    def written(self) -> NDArray[np.bool_]:
        """Whether each processed image was written."""
        mask = np.ones(self.num_processed, dtype=np.bool_)
        mask[[position for position, _, _ in self.quarantined]] = False
        return mask

    def to_json(self) -> dict[str, Any]:
        versions = {"versions": self.versions.hex()} if self.versions else {}
        return {"rows": self.rows, "quarantined": self.quarantined, "digests": self.digests.hex(), **versions}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ShardReport":
        quarantined = [(position, name, reason) for position, name, reason in values["quarantined"]]
        versions = bytes.fromhex(values.get("versions", ""))
        return cls(values["rows"], quarantined, bytes.fromhex(values["digests"]), versions)


def prepare(data: bytes, config: PreprocessConfig) -> bytes:
    """Crop and encode one image. Raises any error of the decoders for data that is not an image."""
    image = center_crop(decode_rgb(data, config.decoder, config.rotate_by_exif), config.image_size)
    return encode_image(image, config.image_format, config.jpeg_quality)


class _Result(NamedTuple):
    """What became of one image. image: its encoded bytes, or None with the reason why it is quarantined."""

    name: str
    label: int
    digest: bytes
    image: bytes | None
    reason: str = ""


def _from_original(original: RawImage, config: PreprocessConfig) -> _Result:
    image, reason = original.attempt(lambda data: prepare(data, config))
    return _Result(original.name, original.label, image_digest(original), image, reason)


def _results(plan: ShardPlan, config: PreprocessConfig, fingerprint: str) -> Iterator[_Result]:
    """The images of a shard in order: copied from earlier artifacts, or made from the originals.

    Some are both, and compared. Raises WrongRowError if they differ.
    """
    if plan.earlier is None:
        yield from (_from_original(original, config) for original in plan.listing.images())
        return
    read, reused = positions_to_read(plan.earlier, fingerprint, plan.index), plan.earlier.places.reused
    originals = (_from_original(o, config) for o in plan.listing.take(np.flatnonzero(read)).images())
    with EarlierRows(plan.earlier) as earlier:
        for position, row in enumerate(rows(plan.listing.table)):
            made = next(originals) if read[position] else None
            if not reused[position]:
                assert made is not None
                yield made
                continue
            digest, reason = plan.earlier.digests[position].tobytes(), plan.earlier.reasons.get(position, "")
            copied = _Result(as_text(row.name), row.label, digest, earlier.image(position), reason)
            is_comparable = made is not None and (made.digest == digest or plan.listing.remote)
            if is_comparable and made != copied:
                raise WrongRowError(earlier.where(position, "differs from what is made of its original now"))
            yield copied if made is None else made  # of an original that has changed: the step then refuses the source


def build_shard(
    plan: ShardPlan, config: PreprocessConfig, out: ArtifactWriter, on_image: Callable[[int], None]
) -> ShardReport:
    """Make one shard and the report beside it. `on_image(n)` is called when n images are done.

    Raises WrongRowError if a row of an earlier artifact is not what it would be now.
    """
    quarantined: list[tuple[int, str, str]] = []
    digests: list[bytes] = []

    def samples() -> Iterator[ImageSample]:
        for position, result in enumerate(_results(plan, config, out.fingerprint)):
            on_image(position)
            digests.append(result.digest)
            if result.image is None:
                quarantined.append((position, result.name, result.reason))
            else:
                key = f"{plan.first + position:08d}"
                yield ImageSample(key, result.image, result.label, result.name, result.digest.hex())

    entry = out.write(plan.name, lambda path: write_image_shard(path, samples(), config.image_format))
    versions = image_versions(plan.listing.table).tobytes() if plan.listing.remote else b""
    report = ShardReport(entry.rows or 0, quarantined, b"".join(digests), versions)
    out.write_json(plan.report, report.to_json())
    return report
