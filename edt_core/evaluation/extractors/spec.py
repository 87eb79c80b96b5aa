"""The interface of feature networks to the rest of the project: one `ExtractorSpec` each, in the network's file.

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

FEATURE_METRICS = ("fid", "kid", "precision", "recall")  # metrics of features alone, for any feature space


class Extractor(Protocol):
    """A feature network on its device."""

    space: str  # the name of its spec

    def __call__(self, pixels: "NDArray[np.uint8] | Tensor") -> "dict[str, NDArray[np.float32]]":
        """Outputs by name, of uint8 [N, S, S, 3]: "features" [N, D]; some networks add "spatial" [N, 2023] and
        "probabilities" [N, K].

        Computed in float32, regardless of autocast and TF32 settings. Raises UserError for other pixels.
        """
        ...


@dataclass(frozen=True)
class ExtractorSpec:
    """A feature network: its names, the source of its weights, and the metrics of its space.

    name: of the feature space, of the network as an input, and of its section of a configuration.
    title: name of the network in sentences. help: of its command-line option.
    suggestion: the option in the message for an evaluation without any network.
    load: load the network from its weights onto a device. Raises UserError for unsuitable weights.
    source: which published weights are expected, and where to get them; "" if a step of the pipeline fits them.
    is_folder: whether the weights are a folder in the transformers format (or a hub id), or one file.
    package, extra: the package that loads it, if a plain installation lacks it, and the extra that installs it.
    dimensions, spatial_dimensions: D of the features and of the spatial ones; None if it depends on the weights.
    dimension_field: the entry of the folder's config.json with D, if it depends on the weights.
    values_per_sample: values stored for each sample, with the usual weights; None if the configuration determines it.
    load_tokens: load the network for its patches' tokens, "tokens" float32 [N, T, K] of uint8 [N, S, S, 3]; None if its
    tokens are no targets of a training.
    metrics: names of the metrics of its space.
    always_recorded: whether reports record its section of the configuration even if it is empty. True for the networks
    of the first version only: others would change the fingerprints of existing reports without them.
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
    values_per_sample: int | None = None
    load_tokens: "Callable[[str | Path, Any], Callable[[Any], dict[str, NDArray[np.float32]]]] | None" = None
    metrics: tuple[str, ...] = FEATURE_METRICS
    always_recorded: bool = False

    @property
    def option(self) -> str:
        """The command-line option."""
        return f"--{self.name}-weights" if self.source else f"--{self.name}"

    @property
    def needed(self) -> str:
        """Which weights to get if they are missing, and how to specify them; for messages."""
        return f"{self.source}, and set {self.name}.weights ({self.option})"

    @property
    def places(self) -> str:
        """The accepted forms of the weights' location, for help texts."""
        if self.is_folder:
            return f"folder or hub id of {self.title} in the transformers format, or MLflow URI"
        return f"file of {self.title}'s published weights, URL with sha256, or MLflow URI"
