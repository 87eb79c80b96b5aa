"""The sections of a pipeline's configuration that say where published networks of features are, one for each."""

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
    """A published network of features. What its weights hold counts, not where they lie."""

    weights: str | None = runtime(None, description="")
    sha256: str | None = runtime(None, pattern="^[0-9a-f]{64}$", description="")


def with_networks(base: type[S]) -> type[S]:
    """The base with a section for each published network after its own fields, named as the network's space."""
    fields = {}
    for space in PUBLISHED_SPACES:
        section = _section(space)
        fields[space] = (section, section() if extractor_spec(space).always_recorded else added(section()))
    made: type[S] = create_model(base.__name__, __base__=base, __module__=base.__module__, **fields)  # type: ignore[call-overload]
    return made


def _section(space: str) -> type[ExtractorConfig]:
    """`ExtractorConfig` in the words of the network's spec."""
    spec = extractor_spec(space)
    file, folder = "digest that the weights file must have; needed with a URL", "digest that the folder must have"
    return create_model(
        f"{spec.title}Config",
        __base__=ExtractorConfig,
        __doc__=f"{spec.title}, a published network of features. What its weights hold counts, not where they lie.",
        weights=(str | None, runtime(None, description=spec.places)),
        sha256=(str | None, runtime(None, pattern="^[0-9a-f]{64}$", description=folder if spec.is_folder else file)),
    )
