"""Networks of features behind one call: pixels in, what a metric is computed from out.

Legend: N images, S image side in pixels, D features, K classes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.errors import UserError
from edt_core.evaluation.extractors.pixels import check_pixels, exact_fp32

if TYPE_CHECKING:
    from edt_core.evaluation.extractors.classifier import Classifier

__all__ = ["ClassifierExtractor", "Extractor", "check_pixels", "load_extractor"]

SPACES = ("inception", "dinov2", "classifier")


class Extractor(Protocol):
    """A network of features on its device."""

    space: str  # one of SPACES

    def __call__(self, pixels: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        """uint8 [N, S, S, 3] -> "features" [N, D] and, where the network has them, "spatial" [N, 2023] and
        "probabilities" [N, K].

        Computed in float32 whatever is set outside. Raises UserError for other pixels.
        """
        ...


class ClassifierExtractor:
    """The small classifier that was fitted on the data set itself."""

    space = "classifier"

    def __init__(self, model: "Classifier") -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    def __call__(self, pixels: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        """uint8 [N, S, S, 3] -> features [N, D] and probabilities [N, K]."""
        from edt_core.evaluation.extractors.classifier import classify

        check_pixels(pixels)
        levels = pixels.cpu().numpy() if isinstance(pixels, Tensor) else pixels
        with exact_fp32(self.device):
            features, probabilities = classify(self.model, levels)
        return {"features": features, "probabilities": probabilities}


def load_extractor(space: str, location: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """The network of a feature space: Inception's weights file, DINOv2's folder or hub id, a classifier's folder.

    Raises UserError where there is none, or it is something else.
    """
    if space == "inception":
        from edt_core.evaluation.extractors.inception import Inception

        return Inception.load(Path(location), device)
    if space == "dinov2":
        from edt_core.evaluation.extractors.dinov2 import Dinov2

        return Dinov2.load(location, device)
    if space == "classifier":
        return _load_classifier(Path(location), device)
    raise UserError(f"there is no feature space {space!r}; there are {', '.join(SPACES)}")


def _load_classifier(folder: Path, device: torch.device | str) -> ClassifierExtractor:
    from safetensors import SafetensorError

    from edt_core.evaluation.extractors.classifier import Classifier

    try:
        return ClassifierExtractor(Classifier.load(folder, device))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise UserError(
            f"no classifier at {folder}: {reason}; give the folder of a classifier artifact, or run its step again"
        ) from error
