"""Flow matching: the velocity of a straight path from noise to data (SiT, arXiv 2401.08740).

x_t = t x_1 + (1 - t) x_0, with data x_1, noise x_0 and t in [0, 1]: t = 1 is the data, as in SiT. (Other code, such as
SD3's and diffusers', counts the other way, sigma = 1 - t.) The model gets t as it is, and predicts x_1 - x_0.

In the names of the interface, `x_start` is the data x_1, and `noise` is x_0. Shapes: x [N, C, H, W]; t float32 [N].
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.diffusion.chain import Chain, Leap
from edt_core.diffusion.flow_chains import CHAINS, flow_chain, ode_times
from edt_core.diffusion.objective import (
    ContinuousObjective,
    Losses,
    Prediction,
    SamplerChoice,
    TimestepChoice,
    check_shapes,
)
from edt_core.diffusion.schedule import Schedule
from edt_core.diffusion.timesteps import ContinuousSampler, TimestepSampler, logit_normal, shifted
from edt_core.errors import UserError


class FlowMatching(ContinuousObjective):
    """The model predicts the velocity; its loss is the plain squared error."""

    name = "flow"
    meaning = "the velocity from noise to data (flow matching, arXiv 2401.08740)"
    prediction_type = "flow_prediction"
    words = ("velocity",)  # SiT's alone: what others call flow matching often counts time the other way
    outputs: ClassVar[int] = 1
    terms: ClassVar[tuple[str, ...]] = ("mse",)
    samplers: ClassVar[tuple[str, ...]] = tuple(CHAINS)
    preview_sampler: ClassVar[str] = "euler"
    train_defaults: ClassVar[Mapping[str, Any]] = {"min_snr_gamma": None, "timestep_sampler": "uniform"}
    released_chain: ClassVar[Mapping[str, Any]] = {"sampler": "sde"}

    def times(self, choice: TimestepChoice, num_timesteps: int, shift: float = 1.0) -> TimestepSampler:
        """Times in [0, 1], uniform or logit-normal(0, 1), then shifted towards noise."""
        if choice == "loss-second-moment":
            raise UserError(
                "timestep_sampler is loss-second-moment, which remembers losses by timestep, but the times of flow "
                "matching are continuous; set timestep_sampler to uniform or logit-normal"
            )
        return ContinuousSampler(logit_normal if choice == "logit-normal" else None, partial(shifted, shift=shift))

    def check_training(self, min_snr_gamma: float | None) -> None:
        """Raise UserError for a weight by signal-to-noise ratio."""
        if min_snr_gamma is not None:
            raise UserError(
                f"min_snr_gamma is {min_snr_gamma:g}, but the loss of flow matching has no weight by signal-to-noise "
                "ratio; set min_snr_gamma to null"
            )

    def noised(self, schedule: Schedule | None, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = t x_1 + (1 - t) x_0 (SiT, section 2.1)."""
        share = t.float().view(-1, *(1,) * (x_start.ndim - 1))
        return share * x_start.float() + (1 - share) * noise.float()

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
        """The mean squared error of the velocity, in float32."""
        check_shapes(x_start, x_t, noise)
        self.check_training(min_snr_gamma)
        velocity = self.split(model_output, x_start.shape[1]).value
        error = (velocity - (x_start.float() - noise.float())).square().flatten(1).mean(1)
        return Losses({"mse": error})

    def split(self, model_output: Tensor, num_channels: int) -> Prediction:
        """The velocity."""
        if model_output.ndim < 2 or model_output.shape[1] != num_channels:
            raise ValueError(
                f"the model's output has shape {tuple(model_output.shape)}, but the velocity of {num_channels}-channel "
                f"latents has {num_channels} channels. Build the model with with_objective(config, {self.name!r})."
            )
        return Prediction(model_output.float())

    def denoised(self, schedule: Schedule | None, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t + (1 - t) v, the end of the straight path."""
        velocity = self.split(model_output, x_t.shape[1]).value
        return x_t.float() + (1 - t.float().view(-1, *(1,) * (x_t.ndim - 1))) * velocity

    def chain(self, num_timesteps: int, sampler: SamplerChoice, num_steps: int) -> Chain:
        """Euler, Heun, or the SDE, see `edt_core.diffusion.flow_chains`."""
        self.check_sampler(sampler)
        return flow_chain(sampler, num_steps)

    def check_sampler(self, sampler: SamplerChoice) -> None:
        """Raise UserError for a sampler of another objective, and for a diffusion coefficient without the SDE."""
        super().check_sampler(sampler)
        if sampler.name != "sde" and sampler.sde_diffusion != "sigma":
            raise UserError(
                f"sde_diffusion is {sampler.sde_diffusion!r}, but sampler is {sampler.name!r}; set it to sigma, or "
                "sampler to sde"
            )

    def max_steps(self, num_timesteps: int) -> int | None:
        """Any number: the path is continuous."""
        return None

    def calls(self, sampler: str, num_steps: int) -> int:
        """A step of Heun calls the model twice."""
        return CHAINS[sampler].calls * num_steps

    def leap_times(self, num_timesteps: int, sampler: SamplerChoice, num_steps: int, parts: int) -> NDArray[Any]:
        """The times of Euler's method with `num_steps * parts` steps, float32."""
        self.check_sampler(sampler)
        if sampler.name != "euler":
            raise UserError(
                f"the sampler of train.distill.teacher is {sampler.name!r}, but only a step of euler is one call of "
                "the model; set it to euler"
            )
        times = np.array(ode_times(num_steps * parts, sampler.time_shift), np.float32)
        return np.stack([times[first : first + parts + 1] for first in range(0, num_steps * parts, parts)])

    def leap(self, schedule: Schedule | None, t: Tensor, s: Tensor) -> Leap:
        """A step of Euler's method: x + (s - t) v."""
        length = (s - t).view(-1, 1, 1, 1)
        return Leap(torch.ones_like(length), length)

    def leap_weight(self, schedule: Schedule | None, t: Tensor) -> Tensor:
        """1, as in the distillation of a rectified flow (arXiv 2209.03003)."""
        return torch.ones_like(t)
