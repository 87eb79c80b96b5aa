"""Objectives of Gaussian diffusion: a value that determines x_0 and the noise, and a variance in the learned range.

The loss is EDT's: the min-SNR weighted squared error of the value, plus the variational bound.
Shapes: x_start, noise, x_t [N, C, H, W]; model_output [N, 2C, H, W]; t int64 [N], indices of the schedule.
"""

import math
from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.diffusion import equations
from edt_core.diffusion.chain import Chain, Leap, ModelFn, NoiseFn, ProgressFn, SwitchedModel
from edt_core.diffusion.objective import (
    Losses,
    Prediction,
    SamplerChoice,
    ScheduledObjective,
    check_no_shift,
    check_shapes,
)
from edt_core.diffusion.sampling import METHODS, SamplingMethod, sample, sampling_schedule
from edt_core.diffusion.schedule import Coefficients, Schedule
from edt_core.errors import UserError

MIN_SNR_GAMMA = 5.0
_DATA = -1  # as the end of a leap: no noise at all


def q_sample(schedule: Schedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_start noised to timestep t, float32 [N, C, H, W] (Ho 2020, eq. 4)."""
    return equations.diffuse(x_start.float(), noise.float(), schedule.gather(t, x_start.ndim))


class GaussianObjective(ScheduledObjective):
    """The base of all objectives of Gaussian diffusion; a subclass defines its value, and the weight of its error.

    The terms of the loss, whose sum is a hybrid objective as in Nichol & Dhariwal 2021, eq. 16:
    mse: mean squared error of the value times the min-SNR weight.
    vb: this timestep's term of the variational bound, in bits per dimension, with weight 1.
    """

    outputs: ClassVar[int] = 2
    terms: ClassVar[tuple[str, ...]] = ("mse", "vb")
    samplers: ClassVar[tuple[str, ...]] = METHODS
    preview_sampler: ClassVar[str] = "ddim"

    @abstractmethod
    def target(self, x_start: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """The target of the model's prediction, [N, C, H, W]."""

    @abstractmethod
    def min_snr_weight(self, snr: Tensor, gamma: float) -> Tensor:
        """The factor [N] on the squared error of the value, equal to min(SNR, gamma) on that of x_0 (arXiv 2303.09556).

        Easy timesteps with little noise count less. snr: [N].
        """

    def noised(self, schedule: Schedule | None, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As `q_sample`."""
        assert schedule is not None  # that of `schedule`
        return q_sample(schedule, x_start, t, noise)

    def losses(
        self,
        schedule: Schedule | None,
        model_output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        min_snr_gamma: float | None = MIN_SNR_GAMMA,
    ) -> Losses:
        """The losses of each sample for the model's output at (x_t, t).

        Everything is computed in float32, for any dtype of the output and also under autocast, which does not change
        elementwise float32 operations. The variational bound trains only the variance: the predicted mean has no
        gradient in it (Nichol & Dhariwal 2021, section 3.1).
        With `min_snr_gamma=None` the squared error is unweighted. Raises ValueError for shapes that do not match.
        """
        check_shapes(x_start, x_t, noise)
        assert schedule is not None  # that of `schedule`
        prediction = self.split(model_output, x_start.shape[1])
        x_start, x_t, noise = x_start.float(), x_t.float(), noise.float()
        c = schedule.gather(t, x_start.ndim)

        squared_error = (self.target(x_start, noise, c) - prediction.value).square().flatten(1).mean(1)
        bound = self._bound_term(prediction, x_start, x_t, t, c)
        if min_snr_gamma is not None:
            squared_error = squared_error * self.min_snr_weight(torch.as_tensor(c.snr).flatten(), min_snr_gamma)
        return Losses(dict(zip(self.terms, (squared_error, bound), strict=True)))

    def split(self, model_output: Tensor, num_channels: int) -> Prediction:
        """The value, and the variance in the learned range."""
        return Prediction(*equations.split_output(model_output, num_channels))

    def log_variance(self, prediction: Prediction, c: Coefficients) -> Tensor:
        """The log variance in the learned range."""
        assert prediction.variance is not None  # `split` sets it
        return equations.learned_range_log_variance(prediction.variance, c)

    def chain(self, num_timesteps: int, sampler: SamplerChoice, num_steps: int) -> Chain:
        """A sampler that visits `num_steps` of the timesteps, see `sample`."""
        self.check_sampler(sampler)
        method = cast(SamplingMethod, sampler.name)  # one of METHODS
        schedule = sampling_schedule(self.schedule(num_timesteps), num_steps, method)
        steps = schedule.num_timesteps
        noises = steps - 1 if method == "ancestral" else 0  # the last step needs none
        return Chain(steps, noises, partial(_run, self, schedule, method))

    def check_sampler(self, sampler: SamplerChoice) -> None:
        """Raise UserError for a sampler of another objective, and for settings of flow matching."""
        super().check_sampler(sampler)
        check_no_shift(self.name, sampler.time_shift)
        if sampler.sde_diffusion != "sigma":
            raise UserError(
                f"sde_diffusion is {sampler.sde_diffusion!r}, but only the sampler sde of flow matching has one; leave "
                "it out"
            )

    def leap_times(self, num_timesteps: int, sampler: SamplerChoice, num_steps: int, parts: int) -> NDArray[Any]:
        """The timesteps of DDIM, with -1 for the data, and as many more between them at even distances, int64.

        DDIM's last step, from timestep 0, has no timesteps within: its parts but the last one stay there.
        """
        self.check_sampler(sampler)
        if sampler.name != "ddim":
            raise UserError(
                f"the sampler of train.distill.teacher is {sampler.name!r}, but only ddim is deterministic and takes a "
                "step of any length; set it to ddim"
            )
        if num_steps * parts > num_timesteps:
            raise UserError(
                f"train.distill.teacher.num_sampling_steps is {num_steps * parts}, more than the {num_timesteps} "
                "timesteps of the teacher (train.num_timesteps); use at most that many"
            )
        steps = sampling_schedule(self.schedule(num_timesteps), num_steps, "ddim").timestep_map[::-1]
        ends = np.append(steps, _DATA)
        shares = np.linspace(0.0, 1.0, parts + 1)
        times = np.rint(ends[:-1, None] + shares * np.diff(ends)[:, None]).astype(np.int64)
        times[:, :-1] = np.maximum(times[:, :-1], 0)
        return times

    def leap(self, schedule: Schedule | None, t: Tensor, s: Tensor) -> Leap:
        """A step of DDIM (Song 2021, eq. 12 with sigma 0), whose x_0 and noise are linear in x_t and the value."""
        assert schedule is not None  # that of `schedule`
        begin, end, at_data = schedule.gather(t, 4), schedule.gather(s.clamp(min=0), 4), (s == _DATA).view(-1, 1, 1, 1)
        signal = torch.as_tensor(end.signal_scale).masked_fill(at_data, 1.0)
        noise = torch.as_tensor(end.noise_scale).masked_fill(at_data, 0.0)
        one, zero = torch.ones_like(signal), torch.zeros_like(signal)
        return Leap(
            signal * self.x_start(zero, one, begin) + noise * self.noise(zero, one, begin),
            signal * self.x_start(one, zero, begin) + noise * self.noise(one, zero, begin),
        )

    def leap_weight(self, schedule: Schedule | None, t: Tensor) -> Tensor:
        """max(SNR, 1) on the squared error of x_0, the truncated SNR of Salimans & Ho 2022 (section 4)."""
        assert schedule is not None  # that of `schedule`
        c = schedule.gather(t, 4)
        one = torch.ones_like(torch.as_tensor(c.signal_scale))
        return (self.x_start(one, torch.zeros_like(one), c).square() * torch.as_tensor(c.snr).clamp(min=1.0)).flatten()

    def _bound_term(self, prediction: Prediction, x_start: Tensor, x_t: Tensor, t: Tensor, c: Coefficients) -> Tensor:
        """L_t of the variational bound in bits per dimension, [N] (Ho 2020, eq. 5; eq. 13 at t = 0)."""
        true_mean = equations.posterior_mean(x_start, x_t, c)
        mean = equations.posterior_mean(self.x_start(prediction.value.detach(), x_t, c), x_t, c)
        log_variance = self.log_variance(prediction, c)
        kl = equations.gaussian_kl(true_mean - mean, c.log_posterior_variance, log_variance)
        nll = equations.decoder_nll(x_start, mean, log_variance)
        at_data = (t == 0).reshape(-1, *(1,) * (x_start.ndim - 1))
        return torch.where(at_data, nll, kl).flatten(1).mean(1) / math.log(2.0)


def _run(
    objective: GaussianObjective,
    schedule: Schedule,
    method: SamplingMethod,
    model_fn: ModelFn | SwitchedModel,
    initial: Tensor,
    noise: NoiseFn | None,
    progress: ProgressFn | None,
) -> Tensor:
    return sample(model_fn, initial, schedule, method, objective=objective, noise=noise, progress=progress)


class Epsilon(GaussianObjective):
    """The model predicts the noise (Ho 2020, eq. 14), as EDT, DiT and MDTv2 do."""

    name = "epsilon"
    meaning = "noise, and a variance in the learned range"
    prediction_type = "epsilon"

    def target(self, x_start: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        """The noise itself."""
        return noise

    def min_snr_weight(self, snr: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / SNR, which is 1 for SNR <= gamma."""
        return (gamma / snr).clamp(max=1.0)

    def x_start(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """x_0 by Ho 2020, eq. 15."""
        return equations.predict_x_start(x_t, prediction, c)

    def noise(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The value itself."""
        return prediction
