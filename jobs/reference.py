"""reference: features of the real images, the other side of every metric."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import ReferenceConfig
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
    from edt_core.data.shards import load_images

    use_threads(1)
    images = inputs["images"]
    model = Classifier.load(inputs["classifier"].directory(FOLDER), device_name(config.num_gpus))
    shards = images.entries(IMAGE_SHARDS)
    parts, labels = [], []
    for done, entry in enumerate(shards, start=1):
        if not entry.rows:  # a shard of which every image was unreadable
            continue
        pixels, shard_labels = load_images([images.path(entry.path)], entry.rows)
        batches = range(0, len(pixels), config.batch_size)
        parts += [classify(model, pixels[start : start + config.batch_size])[0] for start in batches]
        labels.append(shard_labels)
        progress.update(done, len(shards), "shards")
    features = np.concatenate(parts)
    out.write_bytes(FEATURES_NAME, save({"features": features, "labels": np.concatenate(labels)}), len(features))
    return {"images": len(features), "feature_dim": int(features.shape[1])}


VERB = Verb("reference", "reference", 1, ReferenceConfig, reference, roles=("images", "classifier"))

if __name__ == "__main__":
    VERB.main()
