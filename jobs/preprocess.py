"""preprocess: an image folder -> WebDataset image shards, each a pure function of the plan.

One Ray task makes one shard, so names and bytes are the same with any number of workers and after any crash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from edt_core.artifact import ArtifactWriter, Source
from edt_core.config import PreprocessConfig
from edt_core.data.images import ImageFolder, center_crop, decode_rgb, encode_png, scan_image_folder
from edt_core.data.shards import ImageSample, write_image_shard
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.schema import CLASSES_NAME, IMAGE_SHARD
from jobs.verb import Verb

REJECTED_NAME = "rejected.json"
_SHOWN = 10


@dataclass(frozen=True)
class ShardPlan:
    """What one shard holds: (key, path, class) of each image, in order."""

    name: str
    root: Path
    images: tuple[tuple[str, str, int], ...]
    image_size: int


def plan_shards(source: ImageFolder, config: PreprocessConfig) -> list[ShardPlan]:
    """Cut the sorted images into shards. The key of an image is its place in the whole list."""
    numbered = [(f"{index:08d}", path, label) for index, (path, label) in enumerate(source.entries)]
    cuts = range(0, len(numbered), config.images_per_shard)
    return [
        ShardPlan(
            IMAGE_SHARD.format(k),
            source.root,
            tuple(numbered[cut : cut + config.images_per_shard]),
            config.image_size,
        )
        for k, cut in enumerate(cuts)
    ]


def build_shard(plan: ShardPlan, out: ArtifactWriter) -> tuple[int, list[tuple[str, str]]]:
    """Make one shard; returns the rows written and (path, reason) of what could not be read."""
    rejected: list[tuple[str, str]] = []

    def samples() -> Any:
        for key, path, label in plan.images:
            try:
                data = (plan.root / path).read_bytes()
            except PermissionError as error:  # any other fault of the disk fails the task: it is not the image's
                rejected.append((path, f"PermissionError: {error.strerror}"))
                continue
            try:
                image = center_crop(decode_rgb(data), plan.image_size)
            except Exception as error:  # Pillow's decoders raise whatever they like on hostile bytes
                rejected.append((path, f"{type(error).__name__}: {error}".replace(str(plan.root), "")))
                continue
            yield ImageSample(key, encode_png(image), label, path)

    entry = out.write(plan.name, lambda path: write_image_shard(path, samples()))
    out.write_json(f"rejected/{plan.name}.json", rejected)
    return entry.rows or 0, rejected


def preprocess(
    config: PreprocessConfig, inputs: Mapping[str, Source], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Make every shard of the folder `inputs["source"]`.

    Raises UserError where the folder has no images, one class, or too many unreadable images: the first ten are listed.
    """
    source = scan_image_folder(inputs["source"].path)
    plans = plan_shards(source, config)
    task = ray.remote(_shard_task)
    pending = [task.remote(plan, out) for plan in plans]
    done, rows, rejected = 0, 0, []
    for part in pending:
        shard_rows, shard_rejected = ray.get(part)
        rows, done = rows + shard_rows, done + 1
        rejected += shard_rejected
        progress.update(done, len(plans), "shards")
    check_rejected(rejected, len(source.entries), config.max_bad_fraction, progress)
    out.write_json(CLASSES_NAME, list(source.classes))
    return {
        "images": rows,
        "found": len(source.entries),
        "rejected": len(rejected),
        "rejected_images": [{"path": path, "reason": reason} for path, reason in rejected[:1000]],
        "classes": len(source.classes),
        "image_size": config.image_size,
    }


def _shard_task(plan: ShardPlan, out: ArtifactWriter) -> tuple[int, list[tuple[str, str]]]:
    import json

    if (entry := out.recover(plan.name)) and out.recover(report := f"rejected/{plan.name}.json"):
        listed = json.loads(out.data.read_bytes(report))
        return entry.rows or 0, [(path, reason) for path, reason in listed]
    return build_shard(plan, out)


def check_rejected(
    rejected: Sequence[tuple[str, str]], found: int, max_bad_fraction: float, progress: Progress
) -> None:
    """Warn of unreadable images; raise UserError where their share is above `max_bad_fraction`."""
    if not rejected:
        return
    listing = "".join(f"\n  {path}: {reason}" for path, reason in rejected[:_SHOWN])
    more = f"\n  and {len(rejected) - _SHOWN} more" if len(rejected) > _SHOWN else ""
    share = len(rejected) / found
    if share > max_bad_fraction or len(rejected) == found:
        raise UserError(
            f"{len(rejected)} of {found} images ({share:.2%}) could not be read, more than max_bad_fraction "
            f"{max_bad_fraction:.2%} allows:{listing}{more}\nMend or remove them, or raise preprocess.max_bad_fraction."
        )
    progress.warn(f"{len(rejected)} of {found} images could not be read and are left out:{listing}{more}")


VERB = Verb("preprocess", "images", 1, PreprocessConfig, preprocess, roles=("source",))

if __name__ == "__main__":
    VERB.main()
