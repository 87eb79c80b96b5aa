"""The workflow: labelled images to registered, evaluated models, one branch for each model."""

from pipelines.pipeline.branches import Branch, call_data, call_steps
from pipelines.pipeline.inputs import Published, prepare_source
from pipelines.pipeline.promotion import call_promotion
from pipelines.pipeline.run import Guard, HeldBackError, Work, record_steps, run

__all__ = [
    "Branch",
    "Guard",
    "HeldBackError",
    "Published",
    "Work",
    "call_data",
    "call_promotion",
    "call_steps",
    "prepare_source",
    "record_steps",
    "run",
]
