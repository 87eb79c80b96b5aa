"""Masked tokens: the codes of masked positions, predicted from the others (MaskGIT, arXiv 2202.04200).

A time t in [0, 1] is the share of the sampling steps that are done: at t = 0 all positions are masked, at t = 1 none.
The share between is the arccos schedule, that of the sampler (`halton`).

In the names of the interface, `x_start` has the values of codes, and `noise` chooses what is masked.
Legend: N samples, h side of the grid, T = h² positions, K codes. x [N, 4, h, h], logits [N, K, h, h], t float32 [N].
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from edt_core.diffusion.chain import Chain
from edt_core.diffusion.objective import (
    ContinuousObjective,
    Losses,
    Prediction,
    SamplerChoice,
    TimestepChoice,
    check_no_shift,
    check_shapes,
)
from edt_core.diffusion.schedule import Schedule
from edt_core.diffusion.timesteps import ContinuousSampler, TimestepSampler
from edt_core.diffusion.tokens.halton import check_steps, halton_chain, masked_share
from edt_core.errors import UserError
from edt_core.models import ModelConfig
from edt_core.models.families.codes import MASKED, NUM_CODES, codes_of, is_masked

if TYPE_CHECKING:
    from edt_core.config import ChainConfig, TrainConfig

_MEAN_SHARE = 2 / math.pi  # of the masked positions, over uniform times
_ARCCOS = "has the arccos schedule, whose times"


class MaskedTokens(ContinuousObjective):
    """The model predicts a logit of each code; its loss is the cross-entropy at masked positions."""

    name = "masked_tokens"
    meaning = "the codes of masked positions (MaskGIT, arXiv 2202.04200)"
    prediction_type = "masked_tokens"
    outputs: ClassVar[int] = 1
    terms: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    of_tokens: ClassVar[bool] = True
    samplers: ClassVar[tuple[str, ...]] = ("halton",)
    preview_sampler: ClassVar[str] = "halton"
    train_defaults: ClassVar[Mapping[str, Any]] = {
        "min_snr_gamma": None,
        "timestep_sampler": "uniform",
        "masked_loss": False,
    }
    chain_defaults: ClassVar[Mapping[str, Any]] = {"num_sampling_steps": 32, "guidance_channels": None}

    def times(self, choice: TimestepChoice, num_timesteps: int, shift: float = 1.0) -> TimestepSampler:
        """Times in [0, 1], uniform: the arccos schedule alone decides how many positions are masked."""
        if choice != "uniform":
            raise UserError(
                f"timestep_sampler is {choice}, but the share of masked positions is drawn from the arccos schedule at "
                "uniform times; set timestep_sampler to uniform"
            )
        check_no_shift(self.name, shift, _ARCCOS)
        return ContinuousSampler(None, lambda times: times)

    def check_training(self, min_snr_gamma: float | None) -> None:
        """Raise UserError for a weight by signal-to-noise ratio."""
        if min_snr_gamma is not None:
            raise UserError(
                f"min_snr_gamma is {min_snr_gamma:g}, but masked tokens have no signal-to-noise ratio; set "
                "min_snr_gamma to null"
            )

    def check_recipe(self, config: "TrainConfig") -> None:
        """Raise UserError for an alignment, whose targets are those of diffusion models, and for normalised codes."""
        if config.align is not None:
            raise UserError(
                f"align is {config.align}, but the targets and weights of alignment are those of diffusion models, and "
                f"the objective is {self.name}; set align to null"
            )
        if config.latent_norm:
            raise UserError(
                "latent_norm is true, but codes are read from the values of the latents, which must not be normalised; "
                "set latent_norm to false"
            )

    def noised(self, schedule: Schedule | None, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_start with masked positions: those of the least noise in the first channel, and at least one.

        Their number is the masked share of T, rounded up.
        """
        ranks = noise[:, 0].flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        masked = ranks < (masked_share(t) * ranks.shape[1]).ceil().clamp(min=1).unsqueeze(1)
        return torch.where(masked.view_as(noise[:, :1]), MASKED, x_start.float())

    def losses(
        self,
        schedule: Schedule | None,
        model_output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        min_snr_gamma: float | None = None,
    ) -> Losses:
        """The sum of the cross-entropies at masked positions over their mean number T 2 / π, in float32.

        So the mean over many samples is that over all their masked positions, as in MaskGIT, and a sample with few of
        them counts less.
        """
        check_shapes(x_start, x_t, noise)
        self.check_training(min_snr_gamma)
        logits = self.split(model_output, x_start.shape[1]).value
        at_positions = F.cross_entropy(logits, codes_of(x_start), reduction="none") * is_masked(x_t)
        return Losses({"cross_entropy": at_positions.flatten(1).mean(1) / _MEAN_SHARE})

    def split(self, model_output: Tensor, num_channels: int) -> Prediction:
        """The logits."""
        if model_output.ndim < 2 or model_output.shape[1] != NUM_CODES:
            raise ValueError(
                f"the model's output has shape {tuple(model_output.shape)}, but there are {NUM_CODES} codes, each with "
                "a logit. Use a model of the family MaskGIT."
            )
        return Prediction(model_output.float())

    def chain(self, num_timesteps: int, sampler: SamplerChoice, num_steps: int) -> Chain:
        """The sampler of `edt_core.diffusion.tokens.halton`."""
        self.check_sampler(sampler)
        if num_steps < 1:
            raise UserError(f"num_sampling_steps is {num_steps}; use at least 1")
        return halton_chain(num_steps, sampler.temperature)

    def check_sampler(self, sampler: SamplerChoice) -> None:
        """Raise UserError for a sampler of another objective, and for settings of flow matching."""
        super().check_sampler(sampler)
        check_no_shift(self.name, sampler.time_shift, _ARCCOS)
        if sampler.sde_diffusion != "sigma":
            raise UserError(
                f"sde_diffusion is {sampler.sde_diffusion!r}, but only the sampler sde of flow matching has one; leave "
                "it out"
            )

    def check_chain(self, chain: "ChainConfig", model: ModelConfig) -> None:
        """Raise UserError for steps without a position, guidance of some channels, settings of AMM, and caches."""
        check_steps(chain.num_sampling_steps, model.latent_size)
        if chain.cfg_scale != 1.0 and chain.guidance_channels is not None:
            raise UserError(
                f"guidance_channels is {chain.guidance_channels}, but {model.name} predicts logits, which are guided "
                "all together; set guidance_channels to null"
            )
        if chain.amm_radius is not None or chain.amm_kernel is not None:
            raise UserError(
                f"amm_radius is {chain.amm_radius} and amm_kernel {chain.amm_kernel}, but {model.name} has no "
                "attention modulation (AMM), which was made and measured for diffusion; set both to null"
            )
        if chain.cache is not None:
            raise UserError(
                f"cache is {chain.cache.kind}, but {model.name} draws codes, so its features jump from step to step; "
                "set cache to null"
            )

    def max_steps(self, num_timesteps: int) -> int | None:
        """As many as there are positions, which a model's configuration knows; see `check_chain`."""
        return None
