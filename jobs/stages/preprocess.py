"""preprocess: labelled images -> WebDataset image shards, each a pure function of the plan.

One Ray task makes one shard, so names and bytes are the same with any number of workers and after any crash.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.images import center_crop, decode_rgb, encode_image
from edt_core.data.shards import ImageSample, write_image_shard
from edt_core.data.sources import UNREADABLE, Listing, combine_identity, image_digest, list_source
from edt_core.data.sources.classes import without_images
from edt_core.data.sources.files import as_text
from edt_core.errors import UserError
from edt_core.files.small_files import parse_json
from edt_core.progress import Counts, Progress, Silent
from edt_core.store.artifact import ArtifactWriter, Source
from edt_core.store.digests import listing as listed
from edt_core.store.layout import CLASSES_NAME, IMAGE_SHARD, REPORT_OF_SHARD
from jobs.runtime.pool import MAX_RETRIES, finished
from jobs.stages.stage import Stage

_KEPT = 10_000  # quarantined images in the manifest; all of them are in the shards' reports
_EXAMPLES = 10
_LINE = "\n  "
_TAR_BYTES = 5 << 10  # headers and padding of a sample's three members, and its small ones


@dataclass(frozen=True)
class ShardPlan:
    """What one shard holds: a slice of the listing that begins at image `first`."""

    index: int
    first: int
    listing: Listing

    @property
    def name(self) -> str:
        return IMAGE_SHARD.format(self.index)

    @property
    def report(self) -> str:
        return REPORT_OF_SHARD.format(self.name)


@dataclass
class ShardReport:
    """What became of a shard's images: rows, (place, name, reason) of the quarantined, sha256 of every original."""

    rows: int
    quarantined: list[tuple[int, str, str]]
    digests: bytes

    @property
    def reasons(self) -> list[tuple[str, str]]:
        return [(name, reason) for _, name, reason in self.quarantined]

    @property
    def looked_at(self) -> int:
        return len(self.digests) // len(UNREADABLE)

    def kept(self) -> NDArray[np.bool_]:
        """Whether each image that was looked at was written."""
        kept = np.ones(self.looked_at, dtype=np.bool_)
        kept[[place for place, _, _ in self.quarantined]] = False
        return kept

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "quarantined": self.quarantined, "digests": self.digests.hex()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ShardReport":
        quarantined = [(place, name, reason) for place, name, reason in values["quarantined"]]
        return cls(values["rows"], quarantined, bytes.fromhex(values["digests"]))


def images_per_shard(config: PreprocessConfig) -> int:
    """Images in every shard but the last: by count, and by bytes as if no pixel could be compressed."""
    worst = config.image_size * (3 * config.image_size + 1) + _TAR_BYTES
    if worst > config.max_shard_bytes:
        raise UserError(
            f"preprocess.max_shard_bytes {config.max_shard_bytes} is less than one image of {config.image_size} px may "
            f"take, {worst} bytes; raise it"
        )
    return min(config.images_per_shard, config.max_shard_bytes // worst)


def plan_shards(listing: Listing, config: PreprocessConfig) -> list[ShardPlan]:
    """Cut the listing into shards. The key of an image is its place in the whole listing."""
    size = images_per_shard(config)
    cuts = range(0, len(listing), size)
    return [ShardPlan(k, first, listing.slice(first, first + size)) for k, first in enumerate(cuts)]


def prepare(data: bytes, config: PreprocessConfig) -> bytes:
    """One image cropped and encoded. Raises whatever the decoders raise for what is no image."""
    image = center_crop(decode_rgb(data, config.decoder, config.rotate_by_exif), config.image_size)
    return encode_image(image, config.image_format, config.jpeg_quality)


def build_shard(
    plan: ShardPlan, config: PreprocessConfig, out: ArtifactWriter, tell: Callable[[int], None]
) -> ShardReport:
    """Make one shard and the report beside it. `tell(n)` hears how many images are done."""
    quarantined: list[tuple[int, str, str]] = []
    digests: list[bytes] = []

    def samples() -> Iterator[ImageSample]:
        for place, image in enumerate(plan.listing.images()):
            tell(place)
            digests.append(image_digest(image))
            if image.data is None:
                quarantined.append((place, image.name, image.error or "cannot be read"))
                continue
            try:
                data = prepare(image.data, config)
            except MemoryError:  # the machine's fault, not the image's
                raise
            except Exception as error:  # Pillow's decoders raise whatever they like on hostile bytes
                quarantined.append((place, image.name, f"{type(error).__name__}: {error}"))
            else:
                yield ImageSample(f"{plan.first + place:08d}", data, image.label, image.name, digests[-1].hex())

    entry = out.write(plan.name, lambda path: write_image_shard(path, samples(), config.image_format))
    report = ShardReport(entry.rows or 0, quarantined, b"".join(digests))
    out.write_json(plan.report, report.to_json())
    return report


def preprocess(
    config: PreprocessConfig, inputs: Mapping[str, Source], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Crop labelled images to squares and write them as WebDataset shards.

    `inputs["source"]` says where the images are. Raises UserError where there are none, only one class, too many that
    cannot be read (the first ten are listed), or where they are no longer what `inputs["source"]` was made of.
    """
    import ray

    source = inputs["source"]
    assert source.selection is not None
    listing = list_source(source.selection, Counts(progress))  # what there is to warn of was said with its identity
    plans = plan_shards(listing, config)
    task = ray.remote(_shard_task).options(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")
    pending = {task.remote(plan, config, out, progress, len(listing)): plan.index for plan in plans}
    reports: dict[int, ShardReport] = {}
    quarantined: list[tuple[str, str]] = []
    looked_at = 0
    with closing(finished(list(pending))) as done:
        for ref in done:
            reports[pending[ref]] = report = ray.get(ref)
            progress.update(report.looked_at, len(listing), "images", part=pending[ref])
            quarantined += report.reasons
            looked_at += report.looked_at
            check_quarantined(quarantined, looked_at, len(listing), config.max_bad_fraction)
    ordered = [reports[k] for k in range(len(plans))]
    _check_source(listing, ordered, source)
    if config.image_format == "jpeg":
        progress.warn("the shards are JPEG: train on them if you must, but take FID references from lossless ones")
    out.write_json(CLASSES_NAME, list(listing.classes))
    return _counts(config, listing, ordered, progress)


def _shard_task(
    plan: ShardPlan, config: PreprocessConfig, out: ArtifactWriter, progress: Progress, total: int
) -> ShardReport:
    if out.recover(plan.name) and out.recover(plan.report):
        return ShardReport.from_json(parse_json(out.data.read_bytes(plan.report), plan.report))
    return build_shard(plan, config, out, lambda done: progress.update(done, total, "images", part=plan.index))


def _counts(
    config: PreprocessConfig, listing: Listing, reports: Sequence[ShardReport], progress: Progress
) -> dict[str, Any]:
    quarantined = [item for report in reports for item in report.reasons]
    rows = sum(report.rows for report in reports)
    kept = np.concatenate([report.kept() for report in reports])
    labels = np.asarray(listing.table["label"])[kept]
    class_counts = np.bincount(labels, minlength=len(listing.classes))
    repeats = _repeats(b"".join(report.digests for report in reports), kept, labels)
    if lost := [listing.classes[label] for label in np.flatnonzero((class_counts == 0) & (listing.class_counts > 0))]:
        progress.warn(f"after unreadable images were left out {without_images(lost, len(listing.classes))}")
    if repeats.under_several_classes:
        names = listing.table["name"].take(np.flatnonzero(kept)[np.ravel(repeats.examples)]).to_pylist()
        pairs = [f"{as_text(one)} = {as_text(other)}" for one, other in zip(names[::2], names[1::2], strict=True)]
        progress.warn(
            f"{repeats.under_several_classes} images are in more than one class, byte for byte the same, and are kept "
            f"in each, such as\n  {listed(pairs, _LINE)}"
        )
    assert rows + len(quarantined) == len(listing), "an image was lost or doubled"
    if quarantined:
        progress.warn(f"{len(quarantined)} of {len(listing)} images could not be read:{_listed(quarantined)}")
    return {
        "images": rows,
        "found": len(listing),
        "quarantined": len(quarantined),
        "quarantined_images": [{"path": path, "reason": reason} for path, reason in quarantined[:_KEPT]],
        "duplicates": repeats.duplicates,  # kept: published data sets hold some as well
        "under_several_classes": repeats.under_several_classes,
        "left_out": dict(listing.left_out),  # files that are no images, by extension
        "classes": len(listing.classes),
        "class_counts": class_counts.tolist(),
        "image_size": config.image_size,
        "lossless": config.image_format != "jpeg",
    }


class _Repeats(NamedTuple):
    """Images that are byte for byte the same as another one.

    duplicates: all but one of each. under_several_classes: different images that are in two classes or more; of the
    first ten of them two places [n, 2] each, among the images that were written.
    """

    duplicates: int
    under_several_classes: int
    examples: NDArray[np.int64]


def _repeats(digests: bytes, kept: NDArray[np.bool_], labels: NDArray[np.int32]) -> _Repeats:
    """Repeats among the images that were written, of which `labels` are the classes; `digests` are of all images."""
    words = np.frombuffer(digests, dtype=np.uint64).reshape(len(kept), -1)[kept]
    order = np.lexsort((labels, *words.T))
    same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    mixed = np.flatnonzero(same & (labels[order[1:]] != labels[order[:-1]]))
    image = np.cumsum(~same)[mixed]  # the number of the different image that each pair is of
    _, first = np.unique(image, return_index=True)
    places = mixed[first[:_EXAMPLES]]
    return _Repeats(int(same.sum()), len(first), np.stack([order[places], order[places + 1]], axis=1))


def _check_source(listing: Listing, reports: Sequence[ShardReport], source: Source) -> None:
    """What was read must be what the fingerprint was made of. A remote listing has only its store's word for it."""
    if listing.remote:
        return
    names, labels = (listing.table[column].to_pylist() for column in ("name", "label"))
    digests = b"".join(report.digests for report in reports)
    if combine_identity(listing.classes, names, labels, digests) != source.fingerprint:
        raise UserError(
            f"the images at {source.location} changed while they were read: files were added, removed or written since "
            "the run began; let them settle and run again into an empty folder"
        )


def check_quarantined(
    quarantined: Sequence[tuple[str, str]], looked_at: int, found: int, max_bad_fraction: float
) -> None:
    """Raise UserError where more than `max_bad_fraction` of all `found` images could not be read, or none could."""
    number = len(quarantined)
    if number and (number > max_bad_fraction * found or number == found):
        so_far = "" if looked_at == found else f", {looked_at} looked at so far"
        raise UserError(
            f"{number} of {found} images ({number / found:.2%}{so_far}) could not be read, more than max_bad_fraction "
            f"{max_bad_fraction:.2%} allows:{_listed(quarantined)}\n"
            "Mend or remove them, or raise preprocess.max_bad_fraction: what is finished is kept."
        )


def accept(config: PreprocessConfig, counts: Mapping[str, Any]) -> None:
    """Raise UserError for image shards that were made when more was allowed to be unreadable."""
    quarantined = [(row["path"], row["reason"]) for row in counts["quarantined_images"]]
    check_quarantined(quarantined, counts["found"], counts["found"], config.max_bad_fraction)


def _listed(quarantined: Sequence[tuple[str, str]]) -> str:
    return _LINE + listed([f"{path}: {reason}" for path, reason in sorted(quarantined)], _LINE)


def image_source(config: SourceConfig, progress: Progress | None = None) -> Source:
    """The images of a configuration and the identity of what they are. Raises UserError where there are none."""
    from edt_core.data.sources import list_source, remarks, source_identity

    progress = progress or Silent()
    if config.path is None or config.kind == "digits":
        raise UserError("the digits come with the pipeline (edt run quickstart); here, give images of your own")
    listing = list_source(config, progress)
    for remark in remarks(listing):
        progress.warn(remark)
    return Source(config.path, source_identity(listing, progress), config, len(listing))


STAGE = Stage(
    "preprocess",
    "images",
    2,
    PreprocessConfig,
    preprocess,
    roles=("source",),
    accept=accept,
    examples=(
        "/data/flowers ./images --image-size 256",
        "s3://bucket/imagenet/train s3://bucket/images --image-size 512",
    ),
)
