"""The training loss of EDT: min-SNR weighted squared error of the noise, plus the variational bound.

Shapes: x_start, noise, x_t [N, C, H, W]; model_output [N, 2C, H, W]; t int64 [N], indices of the schedule.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edt_core.diffusion import equations
from edt_core.diffusion.schedule import Coefficients, Schedule

MIN_SNR_GAMMA = 5.0


@dataclass(frozen=True, eq=False)
class Losses:
    """The loss of each sample, float32 [N].

    mse: mean squared error of the noise times the min-SNR weight.
    vb: this timestep's term of the variational bound, in bits a dimension, at weight 1.
    """

    mse: Tensor
    vb: Tensor

    @property
    def loss(self) -> Tensor:
        """What is trained on, [N]: mse + vb, a hybrid objective like Nichol & Dhariwal 2021, eq. 16."""
        return self.mse + self.vb


def q_sample(schedule: Schedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_start with the noise of timestep t, float32 [N, C, H, W] (Ho 2020, eq. 4)."""
    return equations.diffuse(x_start.float(), noise.float(), schedule.gather(t, x_start.ndim))


def training_losses(
    schedule: Schedule,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    min_snr_gamma: float | None = MIN_SNR_GAMMA,
) -> Losses:
    """The losses of each sample for what the model made of (x_t, t).

    `x_t` is `q_sample(schedule, x_start, t, noise)`. All is computed in float32, whatever the dtype of the
    output and also under autocast, which leaves elementwise operations on float32 alone. The variational
    bound trains the variance only: the predicted mean enters it without gradient (Nichol & Dhariwal 2021,
    section 3.1).
    `min_snr_gamma=None` gives the unweighted squared error. Raises ValueError for a shape that does not fit.
    """
    if not x_start.shape == x_t.shape == noise.shape:
        raise ValueError(
            f"x_start {tuple(x_start.shape)}, x_t {tuple(x_t.shape)} and noise {tuple(noise.shape)} must "
            "have one shape. Draw one noise tensor like x_start and make x_t from it with q_sample."
        )
    eps, v = equations.split_output(model_output, x_start.shape[1])
    x_start, x_t, noise = x_start.float(), x_t.float(), noise.float()
    c = schedule.gather(t, x_start.ndim)

    squared_error = (noise - eps).square().flatten(1).mean(1)
    bound = _bound_term(eps.detach(), v, x_start, x_t, t, c)
    if min_snr_gamma is not None:
        squared_error = squared_error * min_snr_weight(torch.as_tensor(c.snr).flatten(), min_snr_gamma)
    return Losses(mse=squared_error, vb=bound)


def min_snr_weight(snr: Tensor, gamma: float = MIN_SNR_GAMMA) -> Tensor:
    """min(SNR, gamma) / SNR, the Min-SNR weight of a loss on the noise (Hang et al. 2023, arXiv 2303.09556).

    snr and the weight: [N]. Easy, hardly noisy timesteps count less; where SNR <= gamma the weight is 1.
    """
    return (gamma / snr).clamp(max=1.0)


def _bound_term(eps: Tensor, v: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, c: Coefficients) -> Tensor:
    """L_t of the variational bound in bits a dimension, [N] (Ho 2020, eq. 5; eq. 13 at t = 0)."""
    true_mean = equations.posterior_mean(x_start, x_t, c)
    mean = equations.posterior_mean(equations.predict_x_start(x_t, eps, c), x_t, c)
    log_variance = equations.learned_range_log_variance(v, c)
    kl = equations.gaussian_kl(true_mean - mean, c.log_posterior_variance, log_variance)
    nll = equations.decoder_nll(x_start, mean, log_variance)
    at_data = (t == 0).reshape(-1, *(1,) * (x_start.ndim - 1))
    return torch.where(at_data, nll, kl).flatten(1).mean(1) / math.log(2.0)
