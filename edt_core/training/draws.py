"""The random numbers of a training step: a function of (seed, step) and a sample's place in the global batch.

Each rank draws the numbers of its own rows (`edt_core.data.randomness`), as the loader does for mirror images.

Legend: B global batch, n the rows that are drawn, P passes (1, or 2 with the masked loss), C latent channels, h latent
height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edt_core.data.loader import on_device
from edt_core.data.randomness import generator, normal_rows, uniform_rows
from edt_core.models import ModelConfig, draw_mask_ratios, mask_sites, masks_of, slice_masks
from edt_core.training.prune.gates import count_candidates, gumbel, temperature

if TYPE_CHECKING:
    from edt_core.config import TrainConfig


MOST_SHIFT = 0.2  # of the chain, as in SRA (arXiv 2505.02831)


@dataclass(frozen=True)
class StepDraws:
    """Draws of one step for n rows. The leading P is (full, masked): each has its own noise and label dropout.

    posterior_noise [n, C, h, h], drop_label bool [P, n], uniforms [B] (timesteps), noise [P, n, C, h, h], masks: n rows
    for each masking site, see `draw_masks`; none without the masked loss. shift [n]: by how much of the chain the EMA
    model sees less noise, in 0..0.2; None unless a training aligns with it. gumbel [n, K]: numbers that choose which
    blocks are kept, at the temperature tau; None unless a training learns that.
    """

    posterior_noise: Tensor
    drop_label: Tensor
    uniforms: Tensor
    noise: Tensor
    masks: tuple[Tensor, ...]
    shift: Tensor | None = None
    gumbel: Tensor | None = None
    tau: float = 1.0

    def rows(self, places: slice) -> StepDraws:
        """The draws of some rows. `uniforms` stays whole: timesteps are drawn for all at once."""
        return replace(
            self,
            posterior_noise=self.posterior_noise[places],
            drop_label=self.drop_label[:, places],
            noise=self.noise[:, places],
            masks=tuple(slice_masks(self.masks, places)),
            shift=None if self.shift is None else self.shift[places],
            gumbel=None if self.gumbel is None else self.gumbel[places],
        )

    def pinned(self, device: torch.device) -> StepDraws:
        """The same draws in page-locked memory, for asynchronous copies to a GPU; unchanged if `device` is no GPU.

        They become contiguous: CUDA copies other tensors through memory that is not page-locked, and waits for it.
        """
        if device.type != "cuda":
            return self
        with on_device(device):
            return self._map(lambda tensor: tensor.contiguous().pin_memory())

    def to(self, device: torch.device) -> StepDraws:
        """Copy to a device, except `uniforms`, which the host uses."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, move: Callable[[Tensor], Tensor]) -> StepDraws:
        return replace(
            self,
            posterior_noise=move(self.posterior_noise),
            drop_label=move(self.drop_label),
            noise=move(self.noise),
            masks=tuple(move(mask) for mask in self.masks),
            shift=None if self.shift is None else move(self.shift),
            gumbel=None if self.gumbel is None else move(self.gumbel),
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on a device, copied asynchronously through page-locked memory to a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    with on_device(device):
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def draw_step(config: TrainConfig, step: int, model: ModelConfig, rows: slice | None = None) -> StepDraws:
    """Draw step `step` for some rows of the global batch; for all of them if `rows` is None.

    Rows are equal for any choice of rows. Only the timesteps are drawn for the whole batch: a training uses the losses
    of all of them.
    """
    batch, seed, passes = config.global_batch_size, config.seed, config.passes
    everything = slice(0, batch)
    mine = everything if rows is None else rows
    count = mine.stop - mine.start
    shape = (count, model.in_channels, model.latent_size, model.latent_size)
    noise = torch.empty(passes, *shape)
    for of_pass, stream in zip(noise, ("noise", "masked_noise"), strict=False):
        normal_rows(of_pass, mine, seed, step, stream)
    labels = uniform_rows(torch.empty(count, 2), mine, seed, step, "labels")
    shift = uniform_rows(torch.empty(count), mine, seed, step, "align_shift") if config.align == "self" else None
    return StepDraws(
        posterior_noise=normal_rows(torch.empty(shape), mine, seed, step, "posterior"),
        drop_label=(labels.T[:passes] < config.class_dropout_prob).contiguous(),
        uniforms=uniform_rows(torch.empty(batch, dtype=torch.float64), everything, seed, step, "timesteps"),
        noise=noise,
        masks=_masks(config, step, model, mine) if passes == 2 else (),
        shift=None if shift is None else MOST_SHIFT * shift,
        gumbel=None if config.prune is None else _gumbel(config.prune, model, mine, seed, step),
        tau=1.0 if config.prune is None else temperature(step, config.max_steps),
    )


def _gumbel(keep: tuple[int, int], model: ModelConfig, rows: slice, seed: int, step: int) -> Tensor:
    uniform = torch.empty(rows.stop - rows.start, count_candidates(model, keep))
    return gumbel(uniform_rows(uniform, rows, seed, step, "depth"))


def _masks(config: TrainConfig, step: int, model: ModelConfig, rows: slice) -> tuple[Tensor, ...]:
    """Masks of some rows. All rows of a step share a ratio per site."""
    if not model.is_masked:
        return ()
    tokens = [site.tokens for site in mask_sites(model)]
    uniforms = uniform_rows(torch.empty(rows.stop - rows.start, sum(tokens)), rows, config.seed, step, "masks")
    ratios = draw_mask_ratios(model, generator(config.seed, step, "mask_ratios"))
    return tuple(masks_of(model, ratios, uniforms.split(tokens, dim=1)))
