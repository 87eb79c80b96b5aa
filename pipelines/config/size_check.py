"""What a configuration's numbers are too small for: known before the first step, and refused by the last ones."""

from collections.abc import Iterator

from edt_core.errors import UserError
from edt_core.evaluation.extractors import INCEPTION, PUBLISHED_SPACES
from edt_core.evaluation.extractors.weights import feature_dimensions
from edt_core.evaluation.metrics import metric_name, space_metrics
from edt_core.evaluation.metrics.sample_size import PAIRWISE, Shortfall
from edt_core.store.artifact import Source
from jobs.stages.sizes import shortfall_text, size_shortfalls, wanted_metrics
from pipelines.config.schema import PipelineConfig


def check_pipeline_sizes(config: PipelineConfig, images: int | None, statistics: Source | None = None) -> None:
    """Raise UserError, with every problem, for numbers that would fail a run after its training.

    `images`, how many the source has (preprocess may leave some out, and adds none); None where it was not listed.
    """
    if problems := [*size_problems(config, images), *_published_problems(config, statistics)]:
        raise UserError("\n".join(problems))


def size_problems(config: PipelineConfig, images: int | None = None) -> list[str]:
    """Each metric or reader that samples, images or shards do not suffice for, with the fields to change."""
    real = None if config.reference_statistics is not None else images
    problems = [
        shortfall_text(shortfall, _remedies(config, shortfall))
        for shortfall in size_shortfalls(
            config.evaluate, _dimensions(config), config.sample.num_samples, real, config.reference.keep_features
        )
    ]
    return [*problems, *_classifier_problems(config, images), *_shard_problems(config, images)]


def _dimensions(config: PipelineConfig) -> dict[str, int | None]:
    """Of the features of each space; None where they are not known before the weights are loaded."""
    return {
        space: feature_dimensions(space, config.network(space).weights)
        if space in PUBLISHED_SPACES
        else config.classifier.feature_dim
        for space in config.extractors
    }


def _remedies(config: PipelineConfig, shortfall: Shortfall) -> list[str]:
    if shortfall.side == "generated":
        remedies = [f"set sample.num_samples to {shortfall.need} or more"]
    elif (limit := config.source.limit) is not None and limit < shortfall.need:
        remedies = [f"raise source.limit, which is {limit}"]
    else:
        remedies = ["add images to the source"]
    if shortfall.dimensions is None:
        return [*remedies, f"leave {shortfall.metric.removesuffix('_classifier')} out of evaluate.metrics"]
    if shortfall.metric == "fd_classifier" and shortfall.have > 2:
        remedies.append(f"set classifier.feature_dim to {shortfall.have - 1} or less")
    remedies.append("set evaluate.allow_rank_deficient=true")
    remedies.append(f"compare by kid alone (evaluate.metrics=[kid] promote.metric={_kid(config)})")
    return remedies


def _kid(config: PipelineConfig) -> str:
    return metric_name("kid", config.extractors[0])


def _classifier_problems(config: PipelineConfig, images: int | None) -> Iterator[str]:
    """A classifier that no image would be left to fit on."""
    if images is None or "classifier" not in config.extractors:
        return
    taken = min(images, config.classifier.max_images)
    held = max(1, round(taken * config.classifier.holdout_fraction))
    if held >= taken:
        yield (
            f"classifier.holdout_fraction {config.classifier.holdout_fraction:g} keeps all of {taken} images from the "
            "fit. Lower it, or use more images (source.limit, classifier.max_images)."
        )


def _shard_problems(config: PipelineConfig, images: int | None) -> Iterator[str]:
    """A shard that is too small for one image, and workers of a streaming reader that would have no shard."""
    from jobs.stages.preprocess import images_per_shard

    try:
        size = images_per_shard(config.preprocess)
    except UserError as error:
        yield str(error)
        return
    for name in config.models if images is not None else ():
        train, shards = config.train_of(name), -(-(images or 0) // size)
        workers = train.worker_range[1]
        if train.reader == "webdataset" and shards < workers:
            yield (
                f"train.num_workers of {name} is {workers}, and train.reader webdataset needs a shard for each worker: "
                f"{images} images make {shards}, of up to {size} images. Use at most {shards} workers, a smaller "
                "preprocess.images_per_shard, or train.reader=arrow."
            )


def _published_problems(config: PipelineConfig, statistics: Source | None) -> Iterator[str]:
    """What published statistics cannot give, and evaluation or promotion asks for."""
    if statistics is None:
        return
    from edt_core.evaluation.metrics import read_adm

    adm = read_adm(statistics.location)
    images = adm.image_shape[0] if adm.image_shape else 0
    lacking = {} if adm.spatial_statistics is not None else {"sfid": "spatial statistics"}
    lacking |= {metric: "images" for metric, need in PAIRWISE.items() if images < need}
    wanted = wanted_metrics(config.evaluate, INCEPTION, config.sample.num_samples)
    asked = dict.fromkeys(wanted or (), "evaluate.metrics")
    asked |= dict.fromkeys(config.promote.require, "promote.require") | {config.promote.metric: "promote.metric"}
    for metric, field in asked.items():
        if metric in lacking and metric in space_metrics(INCEPTION):
            yield (
                f"{field} asks for {metric}, and {statistics.location} holds no {lacking[metric]} for it. Give the "
                "file that has them, name other metrics, or compare with images (reference_statistics: null)."
            )
