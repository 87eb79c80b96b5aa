"""The random numbers of a training step: a function of (seed, step) for the whole global batch, sliced by rank.

The loader draws rows and their mirroring in the same way (`edt_core.data.randomness`).

Legend: B global batch, C latent channels, h latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edt_core.config import TrainConfig
from edt_core.data.loader import on_device
from edt_core.data.randomness import generator
from edt_core.models import ModelConfig, draw_masks, slice_masks


@dataclass(frozen=True)
class StepDraws:
    """Draws of one step. The leading 2 is (full, masked): each has its own noise and label dropout.

    posterior_noise [B, C, h, h], drop_label bool [2, B], uniforms [B] (timesteps), noise [2, B, C, h, h], masks: B rows
    for each masking site, see `draw_masks`.
    """

    posterior_noise: Tensor
    drop_label: Tensor
    uniforms: Tensor
    noise: Tensor
    masks: tuple[Tensor, ...]

    def rows(self, places: slice) -> "StepDraws":
        """The draws of some samples, such as a rank's. `uniforms` stays whole: timesteps are drawn for all at once."""
        return StepDraws(
            posterior_noise=self.posterior_noise[places],
            drop_label=self.drop_label[:, places],
            uniforms=self.uniforms,
            noise=self.noise[:, places],
            masks=tuple(slice_masks(self.masks, places)),
        )

    def pinned(self, device: torch.device) -> "StepDraws":
        """The same draws in page-locked memory, for asynchronous copies to a GPU; unchanged if `device` is no GPU."""
        if device.type != "cuda":
            return self
        with on_device(device):
            return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "StepDraws":
        """Copy to a device, except `uniforms`, which the host uses."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, move: Callable[[Tensor], Tensor]) -> "StepDraws":
        return StepDraws(
            posterior_noise=move(self.posterior_noise),
            drop_label=move(self.drop_label),
            uniforms=self.uniforms,
            noise=move(self.noise),
            masks=tuple(move(mask) for mask in self.masks),
        )


def draw_step(config: TrainConfig, step: int, model: ModelConfig) -> StepDraws:
    """Draw step `step` for the whole global batch."""
    batch, seed = config.global_batch_size, config.seed
    size = (batch, model.in_channels, model.latent_size, model.latent_size)

    def uniform(stream: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=generator(seed, step, stream), dtype=dtype)

    return StepDraws(
        posterior_noise=torch.randn(size, generator=generator(seed, step, "posterior")),
        drop_label=uniform("labels", 2, batch) < config.class_dropout_prob,
        uniforms=uniform("timesteps", batch, dtype=torch.float64),
        noise=torch.randn((2, *size), generator=generator(seed, step, "noise")),
        masks=tuple(draw_masks(model, batch, generator(seed, step, "masks"))),
    )
