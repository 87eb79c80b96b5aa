"""Which rows of a latents artifact a training holds out, from the image artifact that it was made of.

Latents have no digests of their originals; the reports of the image shards have them, in the order of the rows.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edt_core.config import TrainConfig
from edt_core.data.holdout import Holdout, check_holdout, choose_held_out
from edt_core.data.latents import LatentDataset
from edt_core.data.streaming import ShardStream
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.store import store_of
from jobs.stages.reuse.originals import Originals
from jobs.stages.reuse.siblings import NONE

_COUNTS = ".training_classes.json"  # gone when the artifact is committed


def images_of(latents: Artifact) -> Artifact | None:
    """The image artifact that latents were made of, if it is in their store."""
    store, identity = store_of(latents.folder, "latents", latents.fingerprint), latents.manifest.inputs.get("images")
    return None if store is None or identity is None else store.find("images", identity)


def _images(inputs: Mapping[str, Any]) -> Artifact | None:
    return inputs.get("images") or images_of(inputs["latents"])


def settled_alone(config: TrainConfig, inputs: Mapping[str, Any], progress: Progress) -> TrainConfig:
    """The configuration of a training that is no step of a pipeline, as `TrainConfig.settled`.

    By default nothing is held out, with a warning, if the images are not there. Raises as `held_out`, before any work.
    """
    latents: Artifact = inputs["latents"]
    settled = config.settled(latents.counts["images"])
    if settled.holdout_share and config.holdout == "auto" and _images(inputs) is None:
        progress.warn(
            f"no images are held out, because the images of {latents.folder.uri} are not known: give the images "
            "artifact (--images) to measure the held-out loss, or set --holdout 0"
        )
        return config.settled(0)
    held_out(settled, inputs)
    return settled


def held_out(config: TrainConfig, inputs: Mapping[str, Artifact]) -> Holdout | None:
    """The rows of `inputs["latents"]` that a settled training holds out; None if it holds out none.

    Raises UserError if the images are not known or not those of the latents, or too few are left to train on.
    """
    share = config.holdout_share
    if not share or config.max_steps == 0:
        return None
    latents = inputs["latents"]
    images = _images(inputs)
    if images is None:
        raise UserError(
            f"train.holdout is {share:g}, but the images of {latents.folder.uri} are not known, and held-out images "
            "are chosen by the sha256 of their originals; give the images artifact (--images), or set train.holdout=0"
        )
    check_images(images, latents)
    originals = Originals.of(images)
    digests = originals.digests[originals.row != NONE]
    if len(digests) != latents.counts["images"]:
        raise UserError(
            f"the reports of {images.folder.uri} have {len(digests)} images, and {latents.folder.uri} has "
            f"{latents.counts['images']}; run preprocess and encode again"
        )
    holdout = choose_held_out(digests, share)
    check_holdout(share, len(holdout.rows), len(digests), config.global_batch_size)
    return holdout


def check_images(images: Artifact, latents: Artifact) -> None:
    """Raise UserError if an image artifact is not the one that the latents were made of."""
    if images.fingerprint != latents.manifest.inputs.get("images", images.fingerprint):
        raise UserError(
            f"the images artifact {images.folder.uri} (--images) is not the one that the latents {latents.folder.uri} "
            "were made of, so its class names and its images may be others; give the one they were made of"
        )


def training_images(config: TrainConfig, inputs: Mapping[str, Artifact]) -> int | None:
    """The number of images that a settled training is trained on; None if it is not known yet. Raises as `held_out`."""
    if "latents" not in inputs or (config.holdout_share and _images(inputs) is None):
        return None
    images: int = inputs["latents"].counts["images"]
    holdout = held_out(config, inputs)
    return images if holdout is None else images - len(holdout.rows)


def write_class_counts(
    out: ArtifactWriter, latents: LatentDataset | ShardStream, whole: Artifact, holdout: Holdout, classes: int
) -> None:
    """Leave the number of training images of each class for `class_counts`; of a stream of `whole`, if it has them."""
    if isinstance(latents, LatentDataset):
        counts = np.bincount(latents.labels[holdout.training_rows(len(latents))], minlength=classes).tolist()
    elif out.data.exists(_COUNTS):  # the workers were restarted: no shard is read again for it
        return
    elif (counts := whole.counts.get("class_counts")) is not None:
        counts = (np.array(counts) - np.bincount(latents.labels(holdout.rows), minlength=classes)).tolist()
    out.data.write_bytes(_COUNTS, json.dumps(counts).encode())


def class_counts(out: ArtifactWriter, latents: Artifact, holdout: Holdout | None) -> Sequence[int] | None:
    """The number of training images of each class; None if that is not known."""
    if holdout is None:
        counts: Sequence[int] | None = latents.counts.get("class_counts")
        return counts
    left: Sequence[int] | None = json.loads(out.data.read_bytes(_COUNTS))
    return left


def remove_class_counts(out: ArtifactWriter) -> None:
    """Remove what `write_class_counts` left from a finished attempt."""
    out.data.remove(_COUNTS)


def holdout_counts(
    config: TrainConfig, holdout: Holdout | None, latents: Artifact, rows: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """What the counts of a checkpoint artifact say of its held-out images; empty if there are none.

    rows: of the history; the last one has the held-out loss at the end.
    """
    if holdout is None:
        return {}
    from edt_core.training.validation.measure import validation_interval
    from edt_core.training.validation.overfitting import HELD_OUT_LOSS

    held, measured = len(holdout.rows), len(holdout.measured)
    last = [row[HELD_OUT_LOSS] for row in rows[-1:] if HELD_OUT_LOSS in row]
    return {
        "holdout": {
            "images": held,
            "training_images": latents.counts["images"] - held,
            "measured": measured,
            "every": validation_interval(config, measured),
            **({"loss": last[0]} if last else {}),
        }
    }
