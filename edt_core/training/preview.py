"""A small grid of samples from the averaged weights, drawn during training."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.diffusion import SampleNoise, SamplerChoice, objective_of_model
from edt_core.models import ModelConfig, build_model
from edt_core.precision import exact_products
from edt_core.sampling.labels import trained_classes

_IMAGES, _STEPS, _SEED = 16, 25, 0


class Preview:
    """Samples from the same noise and labels each time, so that grids of different steps can be compared.

    It uses 25 steps of the objective's deterministic sampler without guidance, and no random numbers of the training.
    Classes without an image in `class_counts` [K] are left out.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        num_timesteps: int,
        autoencoder: Path,
        device: torch.device,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        from edt_core.autoencoders.autoencoder import load_autoencoder

        self.model = build_model(model_config).to(device).eval().requires_grad_(False)
        self.autoencoder = load_autoencoder(autoencoder, str(device))
        objective = objective_of_model(model_config)
        most = model_config.latent_size**2 if objective.of_tokens else objective.max_steps(num_timesteps)
        steps = min(_STEPS, most or _STEPS)
        self.chain = objective.chain(num_timesteps, SamplerChoice(objective.preview_sampler), steps)
        shape = (model_config.in_channels, model_config.latent_size, model_config.latent_size)
        self.noise = SampleNoise(_SEED, range(_IMAGES), shape, str(device))
        trained = trained_classes(model_config.num_classes, class_counts)
        self.labels = torch.from_numpy(trained[np.arange(_IMAGES) * len(trained) // _IMAGES]).to(device)

    @exact_products()
    def png(self, weights: Mapping[str, Tensor]) -> bytes:
        """The grid as PNG: 4 x 4 images of evenly spaced classes, in float32 whatever the training's precision."""
        from PIL import Image

        from edt_core.autoencoders.autoencoder import decode_to_pixels

        self.model.load_state_dict(weights)
        latents = self.chain.run(lambda x, t: self.model(x, t, self.labels), self.noise.initial(), None, None)
        out = io.BytesIO()
        Image.fromarray(grid(decode_to_pixels(self.autoencoder, latents, self.model.config))).save(out, "PNG")
        return out.getvalue()


def grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One image uint8 [R * S, R * S, 3] of R * R images uint8 [R * R, S, S, 3], row by row."""
    rows, side = math.isqrt(len(images)), images.shape[1]
    return images.reshape(rows, rows, side, side, 3).swapaxes(1, 2).reshape(rows * side, rows * side, 3)
