"""Feature networks: from pixels to the features that metrics are computed from.

Each network is a module of this package with a `SPEC`, named as its feature space. To register a network, add its name
here. Modules are imported when they are needed.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.extractors.spec import FEATURE_METRICS, Extractor, ExtractorSpec

FITTED_SPACES = ("classifier",)  # of networks that a step of the pipeline fits
PUBLISHED_SPACES = ("inception", "dinov2", "clip")  # of networks with published weights
EXTRACTORS = (*FITTED_SPACES, *PUBLISHED_SPACES)  # feature spaces; also the names of the networks as inputs
TOKEN_SPACES = ("dinov2",)  # of published networks whose patches' tokens are targets of `train.align: features`
INCEPTION = "inception"  # its metrics have the usual names (fid, kid), and ADM's published statistics are in its space

__all__ = [
    "EXTRACTORS",
    "FEATURE_METRICS",
    "FITTED_SPACES",
    "INCEPTION",
    "PUBLISHED_SPACES",
    "TOKEN_SPACES",
    "Extractor",
    "ExtractorSpec",
    "extractor_spec",
    "known_spec",
    "load_extractor",
]


def extractor_spec(space: str) -> ExtractorSpec:
    """The spec of a feature space, by its name. Raises UserError for an unknown one."""
    if (spec := known_spec(space)) is None:
        raise UserError(f"unknown feature space {space!r}; known: {', '.join(EXTRACTORS)}")
    return spec


def known_spec(space: str) -> ExtractorSpec | None:
    """The spec of a feature space; None if it is not registered here, such as a caller's own space."""
    return import_module(f"{__name__}.{space}").SPEC if space in EXTRACTORS else None


def load_extractor(space: str, location: str | Path, device: Any = "cpu") -> Extractor:
    """The network of a feature space, from its weights: a file, a folder or a hub id, depending on its spec.

    Raises UserError for missing or unsuitable weights.
    """
    return extractor_spec(space).load(location, device)
