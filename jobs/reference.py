"""reference: features of the real images, the other side of every metric."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import ray

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import ReferenceConfig
from edt_core.errors import UserError
from edt_core.progress import Progress
from jobs.autoencoder import IMAGE_SHARDS
from jobs.classifier import FOLDER
from jobs.cluster import device_name, use_threads
from jobs.verb import Verb

FEATURES_NAME = "reference.safetensors"  # features float32 [N, D], labels int64 [N]


def reference(
    config: ReferenceConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Extract the features of every image of `inputs["images"]` with `inputs["classifier"]`."""
    task = ray.remote(num_cpus=1, num_gpus=config.num_gpus)(_extract)
    return ray.get(task.remote(config, dict(inputs), out, progress))


def _extract(
    config: ReferenceConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    from safetensors.numpy import save

    from edt_core.classifier import Classifier, classify
    from edt_core.data.prefetch import in_batches
    from edt_core.data.shards import read_image_shard

    use_threads(1)
    images = inputs["images"]
    if not images.counts["lossless"]:
        progress.warn("the image shards are JPEG: distances to them are not those of the original images")
    model = Classifier.load(inputs["classifier"].directory(FOLDER), device_name(config.num_gpus))
    features, labels = [], []
    samples = chain.from_iterable(read_image_shard(path) for path in images.paths(IMAGE_SHARDS))
    for batch in in_batches(samples, config.batch_size):
        features.append(classify(model, np.stack([sample.pixels() for sample in batch]))[0])
        labels += [sample.label for sample in batch]
        progress.update(len(labels), images.counts["images"], "images")
    if len(labels) != images.counts["images"]:
        raise UserError(
            f"the image shards hold {len(labels)} images where {images.counts['images']} are stated; run preprocess "
            "again"
        )
    found = np.concatenate(features)
    out.write_bytes(FEATURES_NAME, save({"features": found, "labels": np.array(labels, dtype=np.int64)}), len(labels))
    return {"images": len(labels), "feature_dim": int(found.shape[1])}


VERB = Verb("reference", "reference", 1, ReferenceConfig, reference, roles=("images", "classifier"))

if __name__ == "__main__":
    VERB.main()
