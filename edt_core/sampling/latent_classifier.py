"""The classifier of images on latents that a chain predicts: decoded, and classified, without a gradient."""

from typing import Any

from torch import Tensor

from edt_core.autoencoders.autoencoder import decode
from edt_core.errors import UserError
from edt_core.evaluation.extractors.classifier import Classifier
from edt_core.evaluation.extractors.pixels import exact_fp32
from edt_core.models import ModelConfig


class LatentClassifier:
    """Scaled latents float32 [N, C, h, h] -> probabilities of the classes, float32 [N, K].

    The images are clamped to -1..1 and not rounded to levels of a byte, which the classifier was fitted on; both
    networks compute in their own dtype, outside autocast. Raises UserError for a classifier of other classes.
    """

    def __init__(self, autoencoder: Any, classifier: Classifier, config: ModelConfig, network: Any = None) -> None:
        number = classifier.sizes["num_classes"]
        if number != config.num_classes:
            raise UserError(
                f"guidance_reference is confused, but the classifier has {number} classes and {config.name} "
                f"{config.num_classes}; use a classifier of the same images"
            )
        self.autoencoder, self.config = autoencoder, config
        self.classifier = classifier if network is None else network

    def __call__(self, latents: Tensor) -> Tensor:
        """The probabilities of a batch."""
        with exact_fp32(latents.device):
            images = decode(self.autoencoder, latents, self.config).clamp(-1, 1)
            logits: Tensor = self.classifier(images)[1]
            return logits.float().softmax(1)
