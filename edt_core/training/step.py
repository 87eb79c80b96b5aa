"""One step of a training: the losses of this rank's samples, and their gradient summed over all ranks.

Legend: N samples of this rank among the B of the global batch, C latent channels, h latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edt_core.data.loader import LatentBatch
from edt_core.data.scale import LatentScale
from edt_core.data.subsets import share
from edt_core.diffusion import Losses, Schedule, objective_of
from edt_core.models.attention import shared_projections
from edt_core.training.align.alignment import AlignedSamples, Alignment, with_align
from edt_core.training.distill.teacher import Teacher
from edt_core.training.draws import StepDraws

if TYPE_CHECKING:
    from edt_core.config import TrainConfig


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a step on the device: latents float32 [N, C, h, h], labels int64 [N], timesteps and weights [N].

    Timesteps are times in the objective's form. `tokens` are those that hidden states are aligned with, float16
    [N, T, K], None without them.
    """

    latents: Tensor
    labels: Tensor
    timesteps: Tensor
    weights: Tensor
    draws: StepDraws
    tokens: Tensor | None = None

    def rows(self, places: slice) -> StepInputs:
        return StepInputs(
            self.latents[places],
            self.labels[places],
            self.timesteps[places],
            self.weights[places],
            self.draws.rows(places),
            None if self.tokens is None else self.tokens[places],
        )


def sampled_latents(batch: LatentBatch, noise: Tensor, scale: LatentScale) -> Tensor:
    """Scaled latents float32 [N, C, h, h], a draw from each row's posterior, on the device of `noise` [N, C, h, h].

    A posterior in half precision is copied as it is and widened on the device, exactly: the draw itself is in float32.
    """
    mean, std = batch.posterior.to(noise.device, non_blocking=True).float().unbind(1)
    return scale.to_model(mean + std * noise)


def step_losses(
    model: nn.Module,
    config: TrainConfig,
    schedule: Schedule | None,
    inputs: StepInputs,
    null_label: int,
    alignment: Alignment | None = None,
    teacher: Teacher | None = None,
) -> Losses:
    """Unweighted losses [passes, N] of the full and, if enabled, the masked pass (arXiv 2410.23788, section 3.3).

    Both passes go through the model as one batch, whose last rows are masked: one call, one gradient exchange. They
    share their timesteps; each has its own noise and label dropout. With an `alignment` the model is an `AlignedModel`.
    With a `teacher` the loss is the distance from its steps, of the full pass alone. With Gumbel numbers among the
    draws the model is a `GatedModel`, in its full pass alone.
    """
    draws, passes, objective = inputs.draws, config.passes, objective_of(config.objective)
    y = torch.where(draws.drop_label[:passes], null_label, inputs.labels).flatten()
    x_start, t = inputs.latents.repeat(passes, 1, 1, 1), inputs.timesteps.repeat(passes)
    noise = draws.noise[:passes].flatten(0, 1)
    x_t = objective.noised(schedule, x_start, t, noise)
    masks = draws.masks if config.masked_loss else None
    rows, align = len(inputs.latents), None
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        if draws.gumbel is not None:
            output = model(x_t, t, y, draws.gumbel, draws.tau)
        elif alignment is None:
            output = model(x_t, t, y, masks)
        else:
            output, projected = model(x_t, t, y, masks, rows)
            alike = noise[:rows], y[:rows], draws.shift, inputs.tokens
            samples = AlignedSamples(inputs.latents, inputs.timesteps, *alike)
            align = alignment.term(schedule, projected, samples)
        target = None if teacher is None else teacher.target(schedule, x_t, t, y)
    if teacher is not None and target is not None:
        losses = teacher.losses(schedule, output.float(), target, t)
    else:
        losses = objective.losses(schedule, output.float(), x_start, x_t, noise, t, min_snr_gamma=config.min_snr_gamma)
    terms = losses.terms if align is None else with_align(losses.terms, align)
    return Losses({name: term.view(passes, -1) for name, term in terms.items()})


def accumulate_gradient(
    model: nn.Module,
    config: TrainConfig,
    schedule: Schedule | None,
    inputs: StepInputs,
    null_label: int,
    alignment: Alignment | None = None,
    teacher: Teacher | None = None,
    number: int | None = None,
) -> Tensor:
    """Add this step's gradient to that of the parameters; return the detached losses [terms * passes, N], term by term.

    Samples are processed in micro-batches. The loss is the sum over the samples, each weighted by its timestep's
    importance, divided by the *global* batch size: gradients add up to that of the whole batch, however it is split.
    Ranks that exchange in each micro-batch have the same `number` of them, and nothing of a weight is kept between two.
    """
    cuts = list(micro_batches(len(inputs.latents), config.micro_batch(), number))
    parts = []
    repeats = len(cuts) > 1 or config.activation_checkpointing  # otherwise nothing is made twice
    with shared_projections(model) if repeats and number is None else nullcontext():
        for place, places in enumerate(cuts, start=1):
            part = inputs.rows(places)
            with _gradient_exchange(model, last=place == len(cuts)):
                losses = step_losses(model, config, schedule, part, null_label, alignment, teacher)
                ((losses.loss * part.weights).sum() / config.global_batch_size).backward()
            parts.append(torch.cat(list(losses.terms.values())).detach())
    return torch.cat(parts, dim=1)


def micro_batches(samples: int, most: int, number: int | None = None) -> Iterator[slice]:
    """Slices of about equal size, none with more than `most` samples, as few as possible or `number`."""
    cuts = number or -(-samples // most)
    return (share(samples, i, cuts) for i in range(cuts))


def _gradient_exchange(model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """Context in which ranks exchange gradients only for the last micro-batch: once a step."""
    no_sync = getattr(model, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()
