"""The workflow: labelled images to registered, evaluated models, one branch for each model."""

from pipelines.pipeline.branches import Branch, call_steps
from pipelines.pipeline.inputs import Published, prepare_source
from pipelines.pipeline.promotion import call_promotion
from pipelines.pipeline.run import Guard, HeldBackError, run

__all__ = [
    "Branch",
    "Guard",
    "HeldBackError",
    "Published",
    "call_promotion",
    "call_steps",
    "prepare_source",
    "run",
]
