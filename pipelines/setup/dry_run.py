"""Estimates of what a pipeline's training needs. The sources are listed, but no images are read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edt_core.config import SourceConfig
from edt_core.progress import CollectedWarnings
from edt_core.training.estimate import estimate
from pipelines.config.schema import PipelineConfig
from pipelines.config.size_check import check_pipeline_sizes

if TYPE_CHECKING:
    from edt_core.data.sources import Listing


def training_needs(config: PipelineConfig) -> str:
    """Parameters, MACs, memory and steps per epoch of each model. Raises UserError for an invalid source."""
    source = source_counts(config.source)
    check_pipeline_sizes(config, source.images)
    lines = [f"note: {remark}" for remark in source.remarks]
    for name in config.models:
        train = config.train_of(name)
        fewest, most = train.worker_range
        workers = str(most) if fewest == most else f"{fewest} to {most}"
        needs = estimate(train, config.model_of(name, source.classes), source.images)
        lines.append(f"{name}: {needs}\n  {'workers':<24} {workers}")
    return "\n\n".join(lines)


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
