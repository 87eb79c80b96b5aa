"""Estimates of the disk space of a pipeline. Bytes per image are those measured in docs/data.md."""

from collections.abc import Mapping

from edt_core.config import TrainConfig
from edt_core.evaluation.extractors import extractor_spec
from edt_core.training.start.kept import kept
from pipelines.config.schema import PipelineConfig

_BYTES_PER_PIXEL = {"webp": 1.48, "png": 1.82, "jpeg": 0.63}  # of ImageNet photos at 256 px
_TAR_BYTES = 4 << 10  # headers and padding of a sample's members
_PUBLISHED_AUTOENCODER = 335 << 20  # Stable Diffusion's, in float32
_SPARE_CHECKPOINTS = 2  # the one with the least loss, and the one being written


def disk_needs(config: PipelineConfig, images: int, classes: int) -> dict[str, int]:
    """Bytes by kind of artifact, for a new store."""
    pixels = config.preprocess.image_size**2
    latent = (
        config.autoencoder.latent_channels * (config.preprocess.image_size // config.autoencoder.downsample_factor) ** 2
    )
    copies, number = 2 if config.encode.write_webdataset else 1, 4 if config.encode.store == "fp32" else 2
    # Of each trained model, and of the untrained one of a training from random weights.
    sets = sum(len(config.trainings_of(name)) + (config.train_of(name).init_from is None) for name in config.models)
    floats = sum(_floats(config, space, classes) for space in config.extractors)
    samples, limit = config.sample.num_samples, config.sample.keep_images
    pictures = (samples if limit == "all" else min(int(limit), samples)) * 3 * pixels
    return {
        "images": int(images * (pixels * _BYTES_PER_PIXEL[config.preprocess.image_format] + _TAR_BYTES)),
        # Mean and std of image and mirror image; their tokens, float16.
        "latents": images * (copies * 4 * number * latent + 2 * 2 * _tokens(config)),
        "autoencoder": _PUBLISHED_AUTOENCODER if config.autoencoder.pretrained else 0,
        "checkpoints": sum(_checkpoints(config, name, images, classes) for name in config.models),
        "samples": sets * config.sample.repeats * (samples * 4 * floats + pictures),
        "reference": min(config.reference.keep_features, images) * 4 * floats,
    }


def _tokens(config: PipelineConfig) -> int:
    """Numbers in the tokens of an image that are stored for `train.align: features`."""
    shapes = [config.train_of(name).align_features for name in config.models]
    return max(side**2 * width for side, width in shapes) if config.token_spaces() else 0


def _floats(config: PipelineConfig, space: str, classes: int) -> int:
    """Numbers that are stored for a sample in a feature space."""
    number = extractor_spec(space).values_per_sample
    return config.classifier.feature_dim + classes if number is None else number


def _checkpoints(config: PipelineConfig, name: str, images: int, classes: int) -> int:
    """Bytes of one model: the checkpoints of its training, the untrained model, and the registered weights."""
    train: TrainConfig = config.train_of(name)
    needs = kept(train, config.model_of(name, classes), images)
    number = min(train.num_to_keep + _SPARE_CHECKPOINTS, -(-needs.steps // train.checkpoint_every) + 1)
    number += 0 if train.keep_every is None else needs.steps // train.keep_every
    exported = needs.weights if config.promote.torch_export else 0
    trained = needs.checkpoint * number + needs.snapshot * needs.snapshots
    return trained * len(config.trainings_of(name)) + needs.checkpoint + needs.weights + exported


def size_text(number: int) -> str:
    """Bytes as text, with the decimal units of disks."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1000:.0f} kB"


def largest_first(needs: Mapping[str, int], most: int = 3) -> str:
    """The kinds that need most, such as `images 124.0 GB, latents 82.1 GB`."""
    ordered = sorted(((kind, number) for kind, number in needs.items() if number), key=lambda item: -item[1])
    return ", ".join(f"{kind} {size_text(number)}" for kind, number in ordered[:most])
