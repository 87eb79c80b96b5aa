"""All randomness of a training step, a function of (seed, step) for the whole global batch, sliced per rank.

Legend: B global batch, C latent channels, h latent height and width.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from edt_core.config import TrainConfig
from edt_core.data.order import batch_indices
from edt_core.models import ModelConfig, draw_masks, slice_masks

# One generator a kind of draw: another kind can be added without moving those that are there.
_STREAMS = {"mirror": 0, "posterior": 1, "labels": 2, "timesteps": 3, "noise": 4, "masks": 5}


def generator(seed: int, step: int, stream: str) -> torch.Generator:
    """The CPU generator of one kind of draw at one step."""
    state = np.random.SeedSequence([seed, step, _STREAMS[stream]]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@dataclass(frozen=True)
class StepDraws:
    """Draws of one step. The leading 2 is (full, masked): each has its own noise and label dropout.

    indices int64 [B], mirror bool [B], posterior_noise [B, C, h, h], drop_label bool [2, B], uniforms [B] (timesteps),
    noise [2, B, C, h, h], masks: one keep-mask bool [B, tokens] a masking site.
    """

    indices: Tensor
    mirror: Tensor
    posterior_noise: Tensor
    drop_label: Tensor
    uniforms: Tensor
    noise: Tensor
    masks: tuple[Tensor, ...]

    def slice(self, rank: int, world_size: int) -> "StepDraws":
        """Rank `rank`'s equal share of the global batch; `uniforms` stay whole: timesteps are drawn for all at once."""
        share = len(self.indices) // world_size
        mine = slice(rank * share, (rank + 1) * share)
        return StepDraws(
            indices=self.indices[mine],
            mirror=self.mirror[mine],
            posterior_noise=self.posterior_noise[mine],
            drop_label=self.drop_label[:, mine],
            uniforms=self.uniforms,
            noise=self.noise[:, mine],
            masks=tuple(slice_masks(self.masks, mine)),
        )

    def to(self, device: torch.device) -> "StepDraws":
        """Copy to a device; `indices`, `mirror` and `uniforms` stay, the host uses them."""
        stay = {"indices", "mirror", "uniforms", "masks"}
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in moved.keys() - stay:
            moved[name] = moved[name].to(device, non_blocking=True)
        moved["masks"] = tuple(mask.to(device, non_blocking=True) for mask in self.masks)
        return StepDraws(**moved)


def draw_step(config: TrainConfig, step: int, num_samples: int, model: ModelConfig) -> StepDraws:
    """Draw step `step` of a training on `num_samples` rows, for the whole global batch."""
    batch, seed = config.global_batch_size, config.seed
    size = (batch, model.in_channels, model.latent_size, model.latent_size)

    def uniform(stream: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=generator(seed, step, stream), dtype=dtype)

    return StepDraws(
        indices=torch.from_numpy(batch_indices(seed, step, batch, num_samples)),
        mirror=uniform("mirror", batch) < config.mirror_prob,
        posterior_noise=torch.randn(size, generator=generator(seed, step, "posterior")),
        drop_label=uniform("labels", 2, batch) < config.class_dropout_prob,
        uniforms=uniform("timesteps", batch, dtype=torch.float64),
        noise=torch.randn((2, *size), generator=generator(seed, step, "noise")),
        masks=tuple(draw_masks(model, batch, generator(seed, step, "masks"))),
    )
