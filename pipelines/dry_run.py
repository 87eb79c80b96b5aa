"""What a pipeline's trainings would take, told before anything is started: the sources are listed, nothing is read."""

from edt_core.config import SourceConfig
from edt_core.errors import UserError
from edt_core.training.estimate import estimate
from pipelines.config import PipelineConfig


def dry_run(config: PipelineConfig) -> str:
    """For each model of a pipeline: parameters, MACs, memory, steps per epoch. Raises UserError for a bad source."""
    images, classes = source_counts(config.source)
    told = []
    for name in config.models:
        train = config.train_of(name)
        fewest, most = train.worker_range
        workers = str(most) if fewest == most else f"{fewest} to {most}"
        told.append(f"{name}: {estimate(train, config.model_of(name, classes), images)}\n  {'workers':<24} {workers}")
    return "\n\n".join(told)


def source_counts(config: SourceConfig) -> tuple[int, int]:
    """Images and classes of a source."""
    from edt_core.data.digits import NUM_DIGITS
    from edt_core.data.sources import list_source

    if config.kind == "digits":
        return min(NUM_DIGITS, config.limit or NUM_DIGITS), len(config.classes) or 10
    listing = list_source(config)
    if not len(listing):
        raise UserError(f"no images in {config.path}")
    return len(listing), len(listing.classes)
