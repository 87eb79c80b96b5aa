"""own images: samples of a model as image shards, for the training of a copy on them (SIMS, arXiv 2408.16333)."""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edt_core.config import PreprocessConfig, SampleConfig
from edt_core.data.images import encode_image
from edt_core.data.shards import ImageSample, write_image_shard
from edt_core.errors import UserError
from edt_core.files.tensor_files import opened_tensors
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.layout import CLASSES_NAME, FEATURE_UNIT, IMAGE_SHARD
from jobs.stages.sample import FEATURE_UNITS, units_per_repeat
from jobs.stages.stage import Stage


def own_images(
    config: PreprocessConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Write the images of `inputs["features"]` as image shards, one for each unit, in the format of the real images.

    Names of classes are those of `inputs["images"]`. Raises UserError if not all images were kept.
    """
    features, images = inputs["features"], inputs["images"]
    sampled = SampleConfig.model_validate(features.manifest.config)
    if sampled.keep_images != "all":
        raise UserError(f"{features.folder.uri} has not the pixels of all samples; sample again with keep_images=all")
    features.verify_once(FEATURE_UNITS)
    counts = np.zeros(images.counts["classes"], np.int64)
    for number in range(units_per_repeat(sampled)):
        with opened_tensors(features.path(FEATURE_UNIT.format(number)), "numpy") as unit:
            indices, labels, pixels = (unit.get_tensor(name) for name in ("indices", "labels", "images"))
        counts += np.bincount(labels, minlength=len(counts))
        samples = list(_samples(config, indices, labels, pixels))

        def write_to(path: Path, samples: list[ImageSample] = samples) -> int:
            return write_image_shard(path, samples, config.image_format)

        if out.recover(IMAGE_SHARD.format(number)) is None:
            out.write(IMAGE_SHARD.format(number), write_to)
        progress.update(int(counts.sum()), sampled.num_samples, "images")
    out.write_json(CLASSES_NAME, images.read_json(CLASSES_NAME))
    return {
        "images": int(counts.sum()),
        "classes": len(counts),
        "class_counts": counts.tolist(),
        "image_size": images.counts["image_size"],
        "lossless": config.image_format != "jpeg",
    }


def _samples(config: PreprocessConfig, indices: Any, labels: Any, pixels: Any) -> Iterator[ImageSample]:
    for index, label, image in zip(indices.tolist(), labels.tolist(), pixels, strict=True):
        data = encode_image(Image.fromarray(image), config.image_format, config.jpeg_quality)
        yield ImageSample(f"{index:08d}", data, label, f"sample {index}", sha256(data).hexdigest())


STAGE = Stage("own images", "own_images", 1, PreprocessConfig, own_images, roles=("features", "images"))
