"""The images of an artifact as digests of their originals and classes, to compare two artifacts."""

import numpy as np

from edt_core.data.sources.delta import LabelledDigests
from edt_core.store.artifact import Artifact
from edt_core.store.layout import CLASSES_NAME, IMAGE_SHARD
from jobs.stages.reuse.latents import ShardImages
from jobs.stages.reuse.originals import Originals
from jobs.stages.reuse.siblings import NONE


def labelled_digests(images: Artifact, originals: Originals | None = None) -> LabelledDigests:
    """The written images of an image artifact. Reads the reports and the labels, no image.

    `originals`: those of the artifact, if they have been read. Raises ManifestError if a report does not match the
    manifest.
    """
    originals = originals or Originals.of(images)
    labels = [np.empty(0, np.int64)]
    for entry in images.entries(IMAGE_SHARD.replace("{:05d}", "*")):
        with ShardImages(images.path(entry.path)) as shard:
            labels.append(shard.labels(slice(None)))
    written = originals.row != NONE
    return LabelledDigests(originals.digests[written], np.concatenate(labels), tuple(images.read_json(CLASSES_NAME)))
