"""Estimates of what a pipeline's training needs. The sources are listed, but no images are read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edt_core.config import SourceConfig, TrainConfig
from edt_core.data.holdout import expected_held_out
from edt_core.models import ModelConfig
from edt_core.printing.redaction import redacted
from edt_core.progress import CollectedWarnings
from edt_core.training.estimate import Estimate, estimate
from edt_core.training.shard.cards import card_rows
from edt_core.training.speed.attention_table import attention_forms
from pipelines.config.schema import PipelineConfig
from pipelines.config.size_check import check_pipeline_sizes
from pipelines.setup.duration import about, timed_pace, training_seconds
from pipelines.setup.hardware import this_machine

if TYPE_CHECKING:
    from edt_core.data.sources import Listing


def training_needs(config: PipelineConfig, cluster: str | None = None, timed: bool = False) -> str:
    """Parameters, MACs, memory and steps per epoch of each model. Raises UserError for an invalid source,
    and for an attention table that a training would refuse.

    `timed`: also the time of the training, from a few steps on this machine, which take seconds. `cluster`: the address
    of the cluster that trains instead; nothing is timed then.
    """
    source = source_counts(config.source)
    check_pipeline_sizes(config, source.images)
    lines = [f"note: {remark}" for remark in source.remarks]
    for name in config.models:
        train = config.train_of(name).settled(source.images)
        images = source.images - expected_held_out(train.holdout_share, source.images)
        attention_forms(train)
        fewest, most = train.worker_range
        workers = str(most) if fewest == most else f"{fewest} to {most}"
        model = config.model_of(name, source.classes)
        needs = estimate(train, model, images)
        lines.append(f"{name}: {needs}{card_rows(train, model)}\n  {'workers':<25} {workers}")
        if (trainings := len(config.trainings_of(name))) > 1:
            lines[-1] += f"\n  {'trainings':<25} {trainings}, one for each seed; the figures are of one"
        if timed:
            time = _training_time(train, model, needs, cluster)
            lines[-1] += f"\n  {'training time':<25} {time}"
    return "\n\n".join(lines)


def _training_time(train: TrainConfig, model: ModelConfig, needs: Estimate, cluster: str | None) -> str:
    if cluster is not None:
        return f"not estimated: the training runs on the cluster {redacted(cluster)}, not on this machine"
    machine = this_machine()
    pace = timed_pace(train, model, needs.memory, machine)
    if isinstance(pace, str):
        return f"not estimated: {pace}"
    seconds = training_seconds(train, needs.images, pace, machine)
    return (
        f"about {about(seconds)} on this machine, at {pace.images_per_s:,.3g} images/s of a worker, timed over "
        f"{pace.steps} steps of {pace.micro_batch} images; the other steps of the pipeline come on top"
    )


@dataclass(frozen=True)
class SourceCounts:
    """The numbers of images and classes of a source, and remarks for the user."""

    images: int
    classes: int
    remarks: tuple[str, ...] = ()
    listing: "Listing | None" = None  # None for the digits, which come with the package


def source_counts(config: SourceConfig) -> SourceCounts:
    """List a source without reading its images. Raises UserError if there are no images to train on."""
    from edt_core.data.digits import NUM_DIGITS
    from edt_core.data.sources import list_source, remarks

    if config.kind == "digits":
        return SourceCounts(min(NUM_DIGITS, config.limit or NUM_DIGITS), len(config.classes) or 10)
    notes = CollectedWarnings()
    listing = list_source(config, notes)
    return SourceCounts(len(listing), len(listing.classes), (*notes.warnings, *remarks(listing)), listing)
