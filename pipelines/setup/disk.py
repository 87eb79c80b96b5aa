"""Disk that a pipeline will take, told before anything is made. Bytes an image are those measured in docs/data.md."""

from collections.abc import Mapping

from edt_core.config import TrainConfig
from edt_core.evaluation.extractors import extractor_spec
from edt_core.training.estimate import estimate
from pipelines.config.schema import PipelineConfig

_BYTES_PER_PIXEL = {"webp": 1.48, "png": 1.82, "jpeg": 0.63}  # of ImageNet photos at 256 px
_TAR_BYTES = 4 << 10  # headers and padding of a sample's members
_PUBLISHED_AUTOENCODER = 335 << 20  # Stable Diffusion's, in float32
_SPARE_CHECKPOINTS = 2  # the one of least loss, and the one being written


def disk_needs(config: PipelineConfig, images: int, classes: int) -> dict[str, int]:
    """Bytes by kind of artifact, with nothing made yet."""
    pixels = config.preprocess.image_size**2
    latent = (
        config.autoencoder.latent_channels * (config.preprocess.image_size // config.autoencoder.downsample_factor) ** 2
    )
    copies = 2 if config.encode.write_webdataset else 1
    sets = 2 * len(config.models)  # the trained model's, and the untrained one's
    floats = sum(_floats(config, space, classes) for space in config.extractors)
    samples, kept = config.sample.num_samples, config.sample.keep_images
    pictures = (samples if kept == "all" else min(int(kept), samples)) * 3 * pixels
    return {
        "images": int(images * (pixels * _BYTES_PER_PIXEL[config.preprocess.image_format] + _TAR_BYTES)),
        "latents": copies * images * 4 * 4 * latent,  # mean and std of image and mirror image, float32
        "autoencoder": _PUBLISHED_AUTOENCODER if config.autoencoder.pretrained else 0,
        "checkpoints": sum(_checkpoints(config, name, images, classes) for name in config.models),
        "samples": sets * config.sample.repeats * (samples * 4 * floats + pictures),
        "reference": min(config.reference.keep_features, images) * 4 * floats,
    }


def _floats(config: PipelineConfig, space: str, classes: int) -> int:
    """Numbers that are kept of a sample in a feature space."""
    kept = extractor_spec(space).values_per_sample
    return config.classifier.feature_dim + classes if kept is None else kept


def _checkpoints(config: PipelineConfig, name: str, images: int, classes: int) -> int:
    """Of one model: what a training keeps, the untrained model, and the registered weights."""
    train: TrainConfig = config.train_of(name)
    estimated = estimate(train, config.model_of(name, classes), images)
    kept = min(train.num_to_keep + _SPARE_CHECKPOINTS, -(-estimated.steps // train.checkpoint_every) + 1)
    exported = estimated.weights if config.promote.torch_export else 0
    return estimated.checkpoint * (kept + 1) + estimated.weights + exported


def size_text(number: int) -> str:
    """Bytes for a person, in powers of ten as disks are sold."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1000:.0f} kB"


def largest_first(needs: Mapping[str, int], most: int = 3) -> str:
    """The kinds that take most, as `latents 82.1 GB, images 124.0 GB`."""
    ordered = sorted(((kind, number) for kind, number in needs.items() if number), key=lambda item: -item[1])
    return ", ".join(f"{kind} {size_text(number)}" for kind, number in ordered[:most])
