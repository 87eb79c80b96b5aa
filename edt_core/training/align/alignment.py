"""The additional loss of a training that aligns hidden states: L = L_diffusion + weight * d(head(h), target).

h are the hidden states of the full pass. The masked pass of a training is not aligned: it sees a part of the tokens,
and no published method aligns such a pass. So `align` is a term of the full pass alone, and 0 in the masked pass.

Legend: N = samples, C = latent channels, s = latent height and width, T = tokens of the coarser grid, K = features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edt_core.diffusion import Schedule, objective_of
from edt_core.models import DiffusionTransformer, ModelConfig
from edt_core.models.base import BlockReached
from edt_core.models.layers import image_to_patches
from edt_core.models.zoo import build_model
from edt_core.training.align.distances import DISTANCES
from edt_core.training.align.head import BlockOutput, averaged
from edt_core.training.align.settings import AlignSettings
from edt_core.training.speed.arithmetic import set_arithmetic

if TYPE_CHECKING:
    from edt_core.config import TrainConfig
    from edt_core.training.state import TrainState

ALIGN = "align"  # the name of the term


@dataclass(frozen=True)
class AlignedSamples:
    """Samples of a full pass: latents and noise [N, C, s, s], timesteps and (dropped) labels [N], and `shift` [N].

    `shift` is that of `StepDraws`; `tokens` are those of a feature network, [N, T, K].
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    labels: Tensor
    shift: Tensor | None
    tokens: Tensor | None = None


class Target(ABC):
    """What hidden states are aligned with."""

    model: DiffusionTransformer | None = None  # a second model of this target

    @abstractmethod
    def tokens(self, schedule: Schedule | None, samples: AlignedSamples) -> Tensor:
        """The target of each token, [N, T, K] on the target's own grid, without a gradient."""


class LatentTarget(Target):
    """The clean latents that the samples are noised from, patch by patch (after SRA 2, arXiv 2601.17830)."""

    def __init__(self, model_config: ModelConfig) -> None:
        self._grid, self._patch_size = model_config.grid, model_config.patch_size

    def tokens(self, schedule: Schedule | None, samples: AlignedSamples) -> Tensor:
        """The patches of the latents, [N, T, patch² · C]."""
        return image_to_patches(samples.latents, self._grid, self._patch_size)


class FeatureTarget(Target):
    """The tokens of a feature network for the image, as the encoding stored them (REPA, arXiv 2410.06940)."""

    def tokens(self, schedule: Schedule | None, samples: AlignedSamples) -> Tensor:
        """The stored tokens, [N, T, K]."""
        assert samples.tokens is not None, "read for this target"
        return samples.tokens


class SelfTarget(Target):
    """Hidden states of a later block of the averaged model, which sees the same samples with less noise (SRA).

    The model shares the memory of the first average; with `train.trainable` its scales are merged at each step.
    """

    model: DiffusionTransformer

    def __init__(self, config: TrainConfig, state: TrainState, block: int, device: torch.device) -> None:
        self._state, self._config, self._objective = state, config, objective_of(config.objective)
        with torch.random.fork_rng(devices=[]):  # its initial weights are not used
            self.model = build_model(state.model.config)
        self.model.eval().requires_grad_(False)
        if not state.model.config.amm_in_training:
            self.model.set_amm(())
        set_arithmetic(self.model, config)
        self.model.load_state_dict(state.average(), assign=True)
        self.model.to(device)  # buffers that are not in a state dict
        self._hidden = BlockOutput(self.model, block, ends=True)
        self._merged_at: int | None = None  # the step whose average the model has, of a training of few parameters

    @torch.no_grad()
    def tokens(self, schedule: Schedule | None, samples: AlignedSamples) -> Tensor:
        """The tokens of the block, [N, T, K], at times that are cleaner by `shift` of the way from noise to data."""
        assert samples.shift is not None, "drawn for this target"
        if self._state.trained is not None and self._merged_at != self._state.step:
            self.model.load_state_dict(self._state.average(), assign=True)
            self._merged_at = self._state.step
        t = self._objective.cleaner(samples.timesteps, samples.shift, self._config.num_timesteps)
        x_t = self._objective.noised(schedule, samples.latents, t, samples.noise)
        with suppress(BlockReached):
            self.model(x_t, t, samples.labels)
        return self._hidden.take()


@dataclass(frozen=True)
class Alignment:
    """The target of a training, and the distance to it."""

    settings: AlignSettings
    target: Target

    @property
    def networks(self) -> list[DiffusionTransformer]:
        """The model that the target computes with, if any."""
        return [] if self.target.model is None else [self.target.model]

    def term(self, schedule: Schedule | None, projected: Tensor, samples: AlignedSamples) -> Tensor:
        """The weighted distance of each sample, float32 [N], of the head's output [N, T, K] for its hidden states."""
        grid = self.settings.grid
        prediction = averaged(projected.float(), grid)
        target = averaged(self.target.tokens(schedule, samples).float(), grid)
        return self.settings.weight * DISTANCES[self.settings.distance](prediction, target)


def alignment_of(
    config: TrainConfig, settings: AlignSettings | None, state: TrainState, device: torch.device
) -> Alignment | None:
    """The alignment of a training with these settings; None without them."""
    if settings is None:
        return None
    if settings.target_block is not None:
        return Alignment(settings, SelfTarget(config, state, settings.target_block, device))
    return Alignment(settings, FeatureTarget() if settings.kind == "features" else LatentTarget(state.model.config))


def loss_terms(config: TrainConfig) -> tuple[str, ...]:
    """The names of the terms of a training's loss: those of its objective, or of a distillation the first; `align`."""
    own = objective_of(config.objective).terms
    if config.distill is not None:
        return own[:1]
    return own if config.align is None else (*own, ALIGN)


def with_align(terms: Mapping[str, Tensor], align: Tensor) -> dict[str, Tensor]:
    """The terms [N * passes] of a loss with `align`, whose values [N] are of the first pass."""
    rest = next(iter(terms.values())).shape[0] - len(align)
    return {**terms, ALIGN: torch.cat([align, align.new_zeros(rest)])}
