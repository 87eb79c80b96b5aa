"""Checks before the first step for numbers that are too small for the last steps of a pipeline."""

from collections.abc import Iterator

from edt_core.data.holdout import expected_held_out, holdout_problem
from edt_core.errors import UserError
from edt_core.evaluation.extractors import INCEPTION, PUBLISHED_SPACES
from edt_core.evaluation.extractors.weights import feature_dimensions
from edt_core.evaluation.metrics import metric_name, space_metrics
from edt_core.evaluation.metrics.sample_size import PAIRWISE, Shortfall
from edt_core.store.artifact import Source
from jobs.stages.sizes import shortfall_text, size_shortfalls, wanted_metrics
from pipelines.config.schema import PipelineConfig


def check_pipeline_sizes(config: PipelineConfig, images: int | None, statistics: Source | None = None) -> None:
    """Raise UserError, with every problem, if numbers would make a run fail after its training.

    `images` is the number of source images, of which preprocess may skip some; None if the source was not listed.
    """
    if problems := [*size_problems(config, images), *_published_problems(config, statistics)]:
        raise UserError("\n".join(problems))


def size_problems(config: PipelineConfig, images: int | None = None) -> list[str]:
    """Each metric or reader with too few samples, images or shards, with the fields to change."""
    real = None if config.reference_statistics is not None else images
    dimensions, kept = _dimensions(config), config.reference.keep_features
    evaluated = list(size_shortfalls(config.evaluate, dimensions, config.sample.num_samples, real, kept))
    along = list(size_shortfalls(config.along.measured, dimensions, config.along.num_samples, real, kept))
    of_images = [shortfall for shortfall in evaluated if shortfall.side == "reference"]  # one line for both
    return [
        *(shortfall_text(shortfall, _remedies(config, shortfall)) for shortfall in evaluated),
        *(
            shortfall_text(shortfall, _along_remedies(config, shortfall))
            for shortfall in along
            if config.along.every is not None and shortfall not in of_images
        ),
        *_classifier_problems(config, images),
        *training_problems(config, images),
    ]


def training_problems(config: PipelineConfig, images: int | None) -> list[str]:
    """What would make the trainings alone fail, each with the fields to change."""
    return [*_token_problems(config), *_shard_problems(config, images), *_holdout_problems(config, images)]


def _token_problems(config: PipelineConfig) -> Iterator[str]:
    """Tokens to align with of another width than the network's: the training would refuse them after encoding."""
    for space in config.token_spaces():
        width = feature_dimensions(space, config.network(space).weights)
        for name in config.models:
            train = config.train_of(name)
            if train.align == "features" and width not in (None, train.align_features[1]):
                yield (
                    f"train.align_features of {name} is {list(train.align_features)}, but the tokens of "
                    f"{config.network(space).weights} are {width} wide; set train.align_features to "
                    f"[{train.align_features[0]}, {width}]"
                )


def _dimensions(config: PipelineConfig) -> dict[str, int | None]:
    """Feature dimensions of each space; None if they are unknown until the weights are loaded."""
    return {
        space: feature_dimensions(space, config.network(space).weights)
        if space in PUBLISHED_SPACES
        else config.classifier.feature_dim
        for space in config.extractors
    }


def _along_remedies(config: PipelineConfig, shortfall: Shortfall) -> list[str]:
    return [_more(config, shortfall, "along"), "leave the metric out of along.metrics"]


def _more(config: PipelineConfig, shortfall: Shortfall, section: str) -> str:
    """What makes the smaller side larger. `section`: the one that makes the samples."""
    if shortfall.side == "generated":
        return f"set {section}.num_samples to {shortfall.need} or more"
    if (limit := config.source.limit) is not None and limit < shortfall.need:
        return f"raise source.limit, which is {limit}"
    return "add images to the source"


def _remedies(config: PipelineConfig, shortfall: Shortfall) -> list[str]:
    remedies = [_more(config, shortfall, "sample")]
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
    """A classifier without images to fit on."""
    if images is None or "classifier" not in config.extractors:
        return
    total = min(images, config.classifier.max_images)
    holdout = max(1, round(total * config.classifier.holdout_fraction))
    if holdout >= total:
        yield (
            f"classifier.holdout_fraction {config.classifier.holdout_fraction:g} holds out all {total} images, so none "
            "are left to fit on. Lower it, or use more images (source.limit, classifier.max_images)."
        )


def _shard_problems(config: PipelineConfig, images: int | None) -> Iterator[str]:
    """A shard too small for one image, and workers of a streaming reader without a shard."""
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
                f"train.num_workers of {name} is {workers}, but train.reader webdataset needs a shard for each worker: "
                f"{images} images make {shards} shards of up to {size} images. Use at most {shards} workers, a smaller "
                "preprocess.images_per_shard, or train.reader=arrow."
            )


def _holdout_problems(config: PipelineConfig, images: int | None) -> Iterator[str]:
    """Held-out images that would leave too few for a training."""
    for name in config.models if images is not None else ():
        train = config.train_of(name).settled(images)
        held_out = expected_held_out(train.holdout_share, images or 0)
        if problem := holdout_problem(train.holdout_share, held_out, images or 0, train.global_batch_size):
            yield f"{name}: {problem}"


def _along_metrics(config: PipelineConfig) -> tuple[str, ...]:
    """Metrics that evaluations along the training must compute in Inception's space; none if what can be is enough."""
    if config.along.every is None:
        return ()
    return wanted_metrics(config.along.measured, INCEPTION, config.along.num_samples) or ()


def _published_problems(config: PipelineConfig, statistics: Source | None) -> Iterator[str]:
    """Metrics of evaluation or promotion that the published statistics do not allow."""
    if statistics is None:
        return
    from edt_core.evaluation.metrics import read_adm

    adm = read_adm(statistics.location)
    images = adm.image_shape[0] if adm.image_shape else 0
    lacking = {} if adm.spatial_statistics is not None else {"sfid": "spatial statistics"}
    lacking |= {metric: "images" for metric, need in PAIRWISE.items() if images < need}
    evaluated = wanted_metrics(config.evaluate, INCEPTION, config.sample.num_samples)
    fields = dict.fromkeys(_along_metrics(config), "along.metrics")
    fields |= dict.fromkeys(evaluated or (), "evaluate.metrics")
    fields |= dict.fromkeys(config.promote.require, "promote.require") | {config.promote.metric: "promote.metric"}
    for metric, field in fields.items():
        if metric in lacking and metric in space_metrics(INCEPTION):
            yield (
                f"{field} requests {metric}, but {statistics.location} contains no {lacking[metric]} for it. Use a "
                "file that has them, choose other metrics, or compare with images (reference_statistics: null)."
            )
