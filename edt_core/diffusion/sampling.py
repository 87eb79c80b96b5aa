"""From noise to latents: the ancestral chain and DDIM.

Shapes: x [N, C, H, W] float32. The timestep of a step is the same for the whole batch, so its coefficients
are floats.
References: Ho et al. 2020 (arXiv 2006.11239), Song et al. 2021 (DDIM, arXiv 2010.02502).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from edt_core.diffusion import equations
from edt_core.diffusion.schedule import Schedule
from edt_core.errors import UserError

ModelFn = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], t int64 [N]) -> [N, 2C, H, W]
NoiseFn = Callable[[int], Tensor]  # step -> standard normal noise [N, C, H, W]
SamplingMethod = Literal["ancestral", "ddim"]


@torch.no_grad()
def sample(
    model_fn: ModelFn,
    initial: Tensor,
    schedule: Schedule,
    method: SamplingMethod = "ancestral",
    *,
    noise: NoiseFn | None = None,
    eta: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run the whole chain from `initial`, standard normal [N, C, H, W], and return x_0, float32 [N, C, H, W].

    model_fn gets the timesteps the model was trained on, not the indices of a respaced schedule.
    noise(step) gives the noise of a step, counted from 0 at the noisiest; the last step needs none. DDIM asks
    for it only where `eta` (0: deterministic, 1: as random as the ancestral chain) is above 0.
    progress(done, total) is called after each step.
    The predicted x_0 is not clipped: latents have no fixed range.
    Raises UserError for an unknown method, an eta outside DDIM's 0..1, or a missing noise.
    """
    _check_method(method, noise, eta)
    x = initial.float()
    total = schedule.num_timesteps
    for step in range(total):
        index = total - 1 - step
        t = torch.full((len(x),), int(schedule.timestep_map[index]), dtype=torch.int64, device=x.device)
        eps, v = equations.split_output(model_fn(x, t), x.shape[1])
        random = method == "ancestral" or eta > 0.0
        step_noise = noise(step).to(x) if noise is not None and random and index > 0 else None
        if method == "ancestral":
            x = ancestral_step(schedule, index, x, eps, v, step_noise)
        else:
            x = ddim_step(schedule, index, x, eps, eta, step_noise)
        if progress is not None:
            progress(step + 1, total)
    return x


def ancestral_step(schedule: Schedule, index: int, x_t: Tensor, eps: Tensor, v: Tensor, noise: Tensor | None) -> Tensor:
    """A draw of p(x_{t-1} | x_t) with the learned variance (Ho 2020, algorithm 2); its mean without noise."""
    c = schedule.at(index)
    mean = equations.posterior_mean(equations.predict_x_start(x_t, eps, c), x_t, c)
    if noise is None:
        return mean
    return mean + torch.exp(0.5 * equations.learned_range_log_variance(v, c)) * noise


def ddim_step(schedule: Schedule, index: int, x_t: Tensor, eps: Tensor, eta: float, noise: Tensor | None) -> Tensor:
    """One step of DDIM (Song 2021, eq. 12); without noise, its mean."""
    ab_prev = float(schedule.alphas_cumprod_prev[index])
    sigma = ddim_sigma(schedule, index, eta)
    x_start = equations.predict_x_start(x_t, eps, schedule.at(index))
    direction = math.sqrt(max(1.0 - ab_prev - sigma**2, 0.0))
    x = math.sqrt(ab_prev) * x_start + direction * eps
    return x if noise is None else x + sigma * noise


def ddim_sigma(schedule: Schedule, index: int, eta: float) -> float:
    """The standard deviation of DDIM's noise (Song 2021, eq. 16): eta times that of the posterior."""
    return eta * math.sqrt(float(schedule.posterior_variance[index]))


def _check_method(method: str, noise: NoiseFn | None, eta: float) -> None:
    if method not in ("ancestral", "ddim"):
        raise UserError(f"unknown sampling method {method!r}. Choose 'ancestral' or 'ddim'.")
    if not 0.0 <= eta <= 1.0 or (method == "ancestral" and eta != 0.0):
        raise UserError(
            f"eta is {eta} with method {method!r}: eta is DDIM's share of noise, between 0 and 1. "
            "Leave it at 0 for the ancestral chain."
        )
    if noise is None and (method == "ancestral" or eta > 0.0):
        raise UserError(
            f"method {method!r} with eta {eta} draws noise at each step, but none was given. Pass noise=, "
            "for example a SampleNoise."
        )
