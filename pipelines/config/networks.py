"""The sections of a pipeline's configuration for published feature networks, one for each network."""

from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import create_model

from edt_core.config import Section, added, runtime
from edt_core.evaluation.extractors import EXTRACTORS, PUBLISHED_SPACES, extractor_spec

if TYPE_CHECKING:
    ExtractorName = str
else:
    ExtractorName = Literal[EXTRACTORS]

S = TypeVar("S", bound=Section)


class ExtractorConfig(Section):
    """A published feature network. The content of its weights counts, not their location."""

    weights: str | None = runtime(None, description="")
    sha256: str | None = runtime(None, pattern="^[0-9a-f]{64}$", description="")


def with_networks(base: type[S]) -> type[S]:
    """The base with one more section for each published network, named after the network's space."""
    fields = {}
    for space in PUBLISHED_SPACES:
        section = _section(space)
        fields[space] = (section, section() if extractor_spec(space).always_recorded else added(section()))
    schema: type[S] = create_model(base.__name__, __base__=base, __module__=base.__module__, **fields)  # type: ignore[call-overload]
    return schema


def _section(space: str) -> type[ExtractorConfig]:
    """`ExtractorConfig` with the title and descriptions of the network's spec."""
    spec = extractor_spec(space)
    file, folder = "expected digest of the weights file; required for a URL", "expected digest of the folder"
    return create_model(
        f"{spec.title}Config",
        __base__=ExtractorConfig,
        __doc__=f"{spec.title}, a published feature network. The content of its weights counts, not their location.",
        weights=(str | None, runtime(None, description=spec.places)),
        sha256=(str | None, runtime(None, pattern="^[0-9a-f]{64}$", description=folder if spec.is_folder else file)),
    )
