"""The equations of Gaussian diffusion that training and sampling share, one per function.

Shapes: x, noise, eps [N, C, H, W]; c contains floats or [N, 1, 1, 1] tensors. eps is a predicted noise.
References: Ho et al. 2020 (arXiv 2006.11239), Nichol & Dhariwal 2021 (arXiv 2102.09672).
"""

import math

import torch
from torch import Tensor

from edt_core.diffusion.schedule import Coefficients


def diffuse(x_start: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
    """A draw of q(x_t | x_0): x_t = sqrt(ab) x_0 + sqrt(1 - ab) noise (Ho 2020, eq. 4)."""
    return c.signal_scale * x_start + c.noise_scale * noise


def predict_x_start(x_t: Tensor, eps: Tensor, c: Coefficients) -> Tensor:
    """The x_0 that a predicted noise implies (Ho 2020, eq. 15)."""
    return (x_t - c.noise_scale * eps) / c.signal_scale


def posterior_mean(x_start: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0) (Ho 2020, eq. 7)."""
    return c.posterior_start * x_start + c.posterior_current * x_t


def learned_range_log_variance(v: Tensor, c: Coefficients) -> Tensor:
    """The model's log variance: between log posterior variance (v = -1) and log beta (v = 1).

    Nichol & Dhariwal 2021, eq. 15, whose v in 0..1 is (v + 1) / 2 here. v is not bounded.
    """
    share = (v + 1.0) / 2.0
    return share * c.log_beta + (1.0 - share) * c.log_posterior_variance


def gaussian_kl(mean_gap: Tensor, log_variance_p: float | Tensor, log_variance_q: Tensor) -> Tensor:
    """KL(p || q) in nats of two diagonal Gaussians whose means differ by `mean_gap`, elementwise."""
    ratio = log_variance_p - log_variance_q
    return 0.5 * (torch.exp(ratio) - ratio - 1.0 + mean_gap.square() * torch.exp(-log_variance_q))


def decoder_nll(x_start: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x_0 | x_1) in nats, elementwise: a Gaussian's mass in the bin of x_0 (Ho 2020, eq. 13).

    There are 256 bins in [-1, 1]; the outermost bins are unbounded. Latents are not pixels, but the
    reference training applies the same term to them.
    """
    half_bin = 1.0 / 255.0
    precision = torch.exp(-0.5 * log_variance)
    upper = normal_cdf((x_start - mean + half_bin) * precision)
    lower = normal_cdf((x_start - mean - half_bin) * precision)
    mass = torch.where(x_start < -0.999, upper, torch.where(x_start > 0.999, 1.0 - lower, upper - lower))
    return -torch.log(mass.clamp(min=1e-12))


def normal_cdf(x: Tensor) -> Tensor:
    """Standard normal distribution function, in the tanh approximation of Page 1977, as in the reference code."""
    return 0.5 + 0.5 * torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


def split_output(model_output: Tensor, num_channels: int) -> tuple[Tensor, Tensor]:
    """The predicted value and the variance, float32 [N, C, H, W] each, of a model's output [N, 2C, H, W].

    Raises ValueError unless it has twice the channels of the latents.
    """
    if model_output.ndim < 2 or model_output.shape[1] != 2 * num_channels:
        raise ValueError(
            f"the model's output has shape {tuple(model_output.shape)}, but {num_channels}-channel "
            f"latents need {2 * num_channels} channels, the predicted value and the variance. "
            f"Use a model for these latents that predicts both: create_model(NAME, latent_channels={num_channels})."
        )
    value, variance = model_output.float().split(num_channels, dim=1)
    return value, variance
