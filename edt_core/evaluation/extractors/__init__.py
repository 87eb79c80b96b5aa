"""Networks of features behind one call: pixels in, what a metric is computed from out.

Each network is a module of this package, named as its feature space, with its `SPEC`. To register one is to add its
name here. Nothing heavy is imported for the names.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.extractors.spec import FEATURE_METRICS, Extractor, ExtractorSpec

FITTED_SPACES = ("classifier",)  # of networks that a step of the pipeline makes
PUBLISHED_SPACES = ("inception", "dinov2", "clip")  # of published weights
EXTRACTORS = (*FITTED_SPACES, *PUBLISHED_SPACES)  # feature spaces; each is the role of the network that spans it
INCEPTION = "inception"  # metrics in its space have the field's own names, and ADM's published statistics are of it

__all__ = [
    "EXTRACTORS",
    "FEATURE_METRICS",
    "FITTED_SPACES",
    "INCEPTION",
    "PUBLISHED_SPACES",
    "Extractor",
    "ExtractorSpec",
    "extractor_spec",
    "known_spec",
    "load_extractor",
]


def extractor_spec(space: str) -> ExtractorSpec:
    """The spec of a feature space, by its name. Raises UserError where there is none."""
    if (spec := known_spec(space)) is None:
        raise UserError(f"there is no feature space {space!r}; there are {', '.join(EXTRACTORS)}")
    return spec


def known_spec(space: str) -> ExtractorSpec | None:
    """The spec of a feature space; None for a space of the caller's own."""
    return import_module(f"{__name__}.{space}").SPEC if space in EXTRACTORS else None


def load_extractor(space: str, location: str | Path, device: Any = "cpu") -> Extractor:
    """The network of a feature space, from its weights: a file, a folder or a hub id, as its spec says.

    Raises UserError where there is none, or it is something else.
    """
    return extractor_spec(space).load(location, device)
