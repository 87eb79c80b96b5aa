"""preprocess: labelled images -> WebDataset image shards, each a pure function of the plan.

One Ray task makes one shard, so names and bytes depend neither on the number of workers nor on crashes.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.digits import restore_digits
from edt_core.data.inspection import count_turned
from edt_core.data.sources import Listing, image_versions, list_source, listing_identity
from edt_core.data.sources.classes import without_images
from edt_core.data.sources.files import as_text
from edt_core.data.tables import DigestRows
from edt_core.data.tables.repeats import repeats_among
from edt_core.errors import UserError
from edt_core.files.small_files import parse_json
from edt_core.progress import Counts, Progress, Silent
from edt_core.store.artifact import ArtifactWriter, Source
from edt_core.store.digests import listing as listed
from edt_core.store.folder import Folder
from edt_core.store.layout import CLASSES_NAME
from jobs.runtime.pool import MAX_RETRIES, finished
from jobs.runtime.reach import check_here
from jobs.stages.reuse.image_shard import ShardReport, build_shard, shard_files
from jobs.stages.reuse.images import EarlierImages, earlier_images
from jobs.stages.reuse.plan_file import PLAN_NAME, PlannedShard, ShardPlans, write_plans
from jobs.stages.reuse.siblings import WrongRowError, discard_files, message_of, reuse_record
from jobs.stages.stage import REUSED, Stage

_MOST_LISTED = 10_000  # quarantined images in the manifest; all of them are in the shards' reports
_LINE = "\n  "
_TAR_BYTES = 5 << 10  # headers and padding of a sample's three members, and the contents of the two small ones


def images_per_shard(config: PreprocessConfig) -> int:
    """Images in every shard except the last: limited by count, and by bytes as if pixels were incompressible.

    Raises UserError if a shard cannot contain one image.
    """
    worst = config.image_size * (3 * config.image_size + 1) + _TAR_BYTES
    if worst > config.max_shard_bytes:
        raise UserError(
            f"preprocess.max_shard_bytes is {config.max_shard_bytes}, but one image of {config.image_size} px may take "
            f"{worst} bytes; set at least {worst}"
        )
    return min(config.images_per_shard, config.max_shard_bytes // worst)


def plan_shards(listing: Listing, config: PreprocessConfig, earlier: EarlierImages | None = None) -> ShardPlans:
    """Cut the listing into shards. The key of an image is its position in the whole listing.

    `earlier`: where its images are in artifacts that were made before.
    """
    return ShardPlans(listing, images_per_shard(config), earlier)


def preprocess(
    config: PreprocessConfig, inputs: Mapping[str, Source], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Crop labelled images to squares and write them as WebDataset shards.

    `inputs["source"]` names the location of the images. Raises UserError if there are none, only one class, or too many
    unreadable ones (ten are listed), and if they changed after `inputs["source"]` was made.
    """
    source = inputs["source"]
    assert source.selection is not None
    restore_digits(Folder.at(source.location).local)
    listing = list_source(source.selection, Counts(progress))  # its warnings were shown when the source was opened
    earlier = _earlier_images(config, listing, source, out)
    digests = DigestRows(len(listing))
    try:
        reports, reused = _make_shards(config, listing, earlier, digests, out, progress)
    except WrongRowError as error:
        progress.warn(f"no image of an earlier artifact is reused, all are preprocessed again: {message_of(error)}")
        shards = range(len(plan_shards(listing, config)))
        discard_files(out, [name for number in shards for name in shard_files(number)])
        reports, reused = _make_shards(config, listing, None, digests, out, progress)
    _check_source(listing, digests, source)
    if config.image_format == "jpeg":
        progress.warn("the shards are JPEG, which is lossy: make FID references from lossless shards")
    out.write_json(CLASSES_NAME, list(listing.classes))
    counts = {**_counts(config, listing, reports, digests, progress), **_turned(config, listing, progress)}
    return {**counts, **({REUSED: reused} if reused else {})}


def _earlier_images(
    config: PreprocessConfig, listing: Listing, source: Source, out: ArtifactWriter
) -> EarlierImages | None:
    """Where the images are in earlier artifacts. Raises UserError if the source is not what `source` was made of.

    Images of a local source are found by their sha256, those of a remote one by name, size and version token.
    """
    if listing.remote:
        return earlier_images(out, config, STAGE.version, image_versions(listing.table), by_version=True)
    if source.digests is None or len(source.digests) != len(listing):
        return None
    if listing_identity(listing, source.digests) != source.fingerprint:
        raise _changed(source)
    return earlier_images(out, config, STAGE.version, source.digests)


def _make_shards(
    config: PreprocessConfig,
    listing: Listing,
    earlier: EarlierImages | None,
    digests: DigestRows,
    out: ArtifactWriter,
    progress: Progress,
) -> tuple[list[ShardReport], dict[str, Any] | None]:
    """The reports of all shards, in order, and what the manifest says of the rows that were reused.

    Writes the digests of all originals to `digests`; the reports are returned without them.
    """
    import ray

    plans = write_plans(plan_shards(listing, config, earlier), out.data)
    task = ray.remote(_shard_task).options(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")
    pending = {task.remote(plan, config, out, progress, len(listing)): plan.index for plan in plans}
    reports: dict[int, ShardReport] = {}
    quarantined: list[tuple[str, str]] = []
    processed = 0
    recovered: set[int] = set()
    try:
        with closing(finished(list(pending))) as done:
            for ref in done:
                report, is_recovered = ray.get(ref)
                number = pending.pop(ref)
                recovered |= {number} if is_recovered else set()
                digests.write(plans[number].first, report.digests)
                reports[number] = report.without_digests()
                progress.update(report.num_processed, len(listing), "images", part=number)
                quarantined += report.reasons
                processed += report.num_processed
                check_quarantined(config, quarantined, processed, len(listing))
    except WrongRowError:
        ray.wait(list(pending), num_returns=len(pending))  # none may write a shard after this
        raise
    finally:
        out.data.remove(PLAN_NAME)
    reusing = {
        plan.index: earlier.places.part(plan.first, plan.first + reports[plan.index].num_processed)
        for plan in plans
        if earlier is not None and plan.artifacts is not None and plan.index not in recovered
    }
    return [reports[k] for k in range(len(plans))], reuse_record(reusing, out.fingerprint)


def _shard_task(
    planned: PlannedShard, config: PreprocessConfig, out: ArtifactWriter, progress: Progress, total: int
) -> tuple[ShardReport, bool]:
    """Make a shard, or take over a finished one; returns its report and whether it was taken over."""
    shard, report = shard_files(planned.index)
    if out.recover(shard) and out.recover(report):
        return ShardReport.from_json(parse_json(out.data.read_bytes(report), report)), True
    check_here(planned.folder.local, "the store's folder")
    plan = planned.read()
    restore_digits(plan.listing.root.local)
    check_here(plan.listing.root.local, "the folder of the images")
    return build_shard(plan, config, out, lambda done: progress.update(done, total, "images", part=plan.index)), False


def _counts(
    config: PreprocessConfig,
    listing: Listing,
    reports: Sequence[ShardReport],
    digests: DigestRows,
    progress: Progress,
) -> dict[str, Any]:
    quarantined = [item for report in reports for item in report.reasons]
    rows = sum(report.rows for report in reports)
    written = np.concatenate([report.written() for report in reports])
    labels = np.asarray(listing.table["label"])[written]
    class_counts = np.bincount(labels, minlength=len(listing.classes))
    repeats = repeats_among(digests, np.flatnonzero(written), labels)
    is_emptied = (class_counts == 0) & (listing.class_counts > 0)
    if emptied := [listing.classes[label] for label in np.flatnonzero(is_emptied)]:
        progress.warn(f"without the unreadable images, {without_images(emptied, len(listing.classes))}")
    if repeats.under_several_classes:
        places = np.flatnonzero(written)[np.ravel(repeats.examples)].tolist()
        names = [listing.table["name"][place].as_py() for place in places]
        pairs = [f"{as_text(one)} = {as_text(other)}" for one, other in zip(names[::2], names[1::2], strict=True)]
        progress.warn(
            f"{repeats.under_several_classes} images are in more than one class, identical byte for byte, and are kept "
            f"in each; for example\n  {listed(pairs, _LINE)}"
        )
    assert rows + len(quarantined) == len(listing), "an image was lost or duplicated"
    if quarantined:
        progress.warn(f"{len(quarantined)} of {len(listing)} images could not be read:{_listed(quarantined)}")
    return {
        "images": rows,
        "found": len(listing),
        "quarantined": len(quarantined),
        "quarantined_images": [{"path": path, "reason": reason} for path, reason in quarantined[:_MOST_LISTED]],
        "duplicates": repeats.duplicates,  # kept: published data sets contain some too
        "under_several_classes": repeats.under_several_classes,
        "left_out": dict(listing.left_out),  # files that are not images, by extension
        **({"skipped": dict(listing.skipped)} if listing.skipped else {}),
        "classes": len(listing.classes),
        "class_counts": class_counts.tolist(),
        "image_size": config.image_size,
        "lossless": config.image_format != "jpeg",
    }


def _turned(config: PreprocessConfig, listing: Listing, progress: Progress) -> dict[str, int]:
    """The number of inspected photos that are stored sideways and not turned; empty if there are none.

    Photos of a remote source are not read a second time for it.
    """
    if config.rotate_by_exif or listing.remote:
        return {}
    turned, inspected = count_turned(listing)
    if not turned:
        return {}
    progress.warn(
        f"{turned} of {inspected} inspected images have an EXIF orientation, which is ignored: they are used as "
        "stored, on their side for example. Turn them upright with --set preprocess.rotate_by_exif=true, "
        "unless you compare numbers with published ones"
    )
    return {"turned": turned, "turned_of": inspected}


def _check_source(listing: Listing, digests: DigestRows, source: Source) -> None:
    """Raise UserError unless the images that were read are those of the fingerprint.

    Remote images are not checked: their fingerprint is made of what the store lists, not of their bytes.
    """
    if listing.remote:
        return
    if listing_identity(listing, digests.read) != source.fingerprint:
        raise _changed(source)


def _changed(source: Source) -> UserError:
    return UserError(
        f"the images at {source.location} changed while they were read: files were added, removed or written since "
        "the run started; run again into an empty folder once nothing writes to them. If nothing does, a file was "
        "changed in a way that its times do not show: run once with --digest-again"
    )


def check_quarantined(
    config: PreprocessConfig, quarantined: Sequence[tuple[str, str]], processed: int, total: int
) -> None:
    """Raise UserError if more of all `total` images could not be read than `config` allows, or none could."""
    number, allowed = len(quarantined), config.allowed_unreadable(total)
    if number == total > 0:
        raise UserError(
            f"none of the {total} images could be read:{_listed(quarantined)}\n"
            "Replace them, or set source.path to other images."
        )
    if number > allowed:
        so_far = "" if processed == total else f", {processed} processed so far"
        fraction = enough_fraction(number / processed)
        raise UserError(
            f"{number} of {total} images ({number / total:.2%}{so_far}) could not be read, more than max_bad_fraction "
            f"{config.max_bad_fraction:.2%} allows (here {allowed}):{_listed(quarantined)}\n"
            f"Repair or remove them, or leave them out with --set preprocess.max_bad_fraction={fraction:g} (of `edt "
            f"preprocess`: --max-bad-fraction {fraction:g}). Finished work is kept."
        )


def enough_fraction(share: float) -> float:
    """A value of `max_bad_fraction` that allows this share of unreadable images: rounded up to one digit."""
    unit = 10.0 ** math.floor(math.log10(share))
    return min(1.0, float(f"{math.ceil(share / unit) * unit:.1g}"))


def accept(config: PreprocessConfig, counts: Mapping[str, Any]) -> None:
    """Raise UserError for existing image shards with more unreadable images than the configuration allows."""
    quarantined = [(row["path"], row["reason"]) for row in counts["quarantined_images"]]
    check_quarantined(config, quarantined, counts["found"], counts["found"])


def _listed(quarantined: Sequence[tuple[str, str]]) -> str:
    return _LINE + listed([f"{path}: {reason}" for path, reason in sorted(quarantined)], _LINE)


def image_source(config: SourceConfig, progress: Progress | None = None, digest_again: bool = False) -> Source:
    """The images of a configuration and their identity. Raises UserError if there are none.

    With `digest_again` every image is read, even if its digest is cached.
    """
    from edt_core.data.sources import list_source, listing_identity, remarks, source_digests

    progress = progress or Silent()
    if config.path is None or config.kind == "digits":
        raise UserError("the digits come with the pipeline (edt run quickstart); here, pass your own images")
    listing = list_source(config, progress)
    for remark in remarks(listing):
        progress.warn(remark)
    digests = source_digests(listing, progress, digest_again)
    known = None if listing.remote else digests
    return Source(config.path, listing_identity(listing, digests), config, len(listing), listing.classes, known)


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
