"""What the rest of the project knows of a network of features: one `ExtractorSpec` for each, in the network's own file.

Legend: N images, S image side in pixels, D features, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

FEATURE_METRICS = ("fid", "kid", "precision", "recall")  # those that features alone give, in any space


class Extractor(Protocol):
    """A network of features on its device."""

    space: str  # the name of its spec

    def __call__(self, pixels: "NDArray[np.uint8] | Tensor") -> "dict[str, NDArray[np.float32]]":
        """uint8 [N, S, S, 3] -> "features" [N, D] and, where the network has them, "spatial" [N, 2023] and
        "probabilities" [N, K].

        Computed in float32 whatever is set outside. Raises UserError for other pixels.
        """
        ...


@dataclass(frozen=True)
class ExtractorSpec:
    """A network of features: how people name it, where its weights come from, and what is computed in its space.

    name: of the feature space, of the role of the network as an input, and of its section of a configuration.
    title: of the network in a sentence. help: of its command-line option.
    suggestion: the option in the message for an evaluation without any network.
    load: the network from its weights, on a device. Raises UserError where they are something else.
    source: which published weights are meant, and where people get them; "" where a step of the pipeline makes them.
    is_folder: whether the weights are a folder in the format of transformers (or a hub id), or one file.
    package, extra: the package beyond a plain installation that loads it, and the extra that brings it.
    dimensions, spatial_dimensions: D of the features and of the spatial ones; None where the weights decide.
    dimension_field: the entry of the folder's config.json that has D, where the weights decide.
    kept: numbers that are kept of a sample, with the weights that are usual; None where the configuration decides.
    metrics: names of the metrics of its space.
    always_recorded: whether reports have its section of the configuration also where it says nothing. So it is with
    the networks of the first version; others would change the fingerprints of reports that were made without them.
    """

    name: str
    title: str
    help: str
    suggestion: str
    load: Callable[[str | Path, Any], Extractor]
    source: str = ""
    is_folder: bool = False
    package: str | None = None
    extra: str | None = None
    dimensions: int | None = None
    spatial_dimensions: int | None = None
    dimension_field: str | None = None
    kept: int | None = None
    metrics: tuple[str, ...] = FEATURE_METRICS
    always_recorded: bool = False

    @property
    def option(self) -> str:
        """The command-line option, named as in a configuration."""
        return f"--{self.name}-weights" if self.source else f"--{self.name}"

    @property
    def needed(self) -> str:
        """What to get where there are no weights, and how to name them."""
        return f"{self.source}, and set {self.name}.weights ({self.option})"

    @property
    def places(self) -> str:
        """What the weights may be, for a person."""
        if self.is_folder:
            return f"folder or hub id of {self.title} in the format of transformers, or MLflow URI"
        return f"file of {self.title}'s published weights, URL with sha256, or MLflow URI"
