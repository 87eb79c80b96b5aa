"""The noise schedule: quantities derived from the betas, in float64, for the whole chain or a respaced one.

Shapes: T timesteps in the schedule, N samples. ab is alphas_cumprod, the "alpha bar" of the papers.
References: Ho et al. 2020 (arXiv 2006.11239), Nichol & Dhariwal 2021 (arXiv 2102.09672).
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.errors import UserError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Spacing = Literal["ends", "trailing"]


class Coefficients(NamedTuple):
    """The coefficients of the equations at one timestep: floats, or tensors [N, 1, ...] for a timestep per sample."""

    signal_scale: float | Tensor  # sqrt(ab)
    noise_scale: float | Tensor  # sqrt(1 - ab)
    snr: float | Tensor  # ab / (1 - ab)
    posterior_start: float | Tensor  # weight of x_0 in the posterior mean
    posterior_current: float | Tensor  # weight of x_t in the posterior mean
    log_beta: float | Tensor  # upper end of the learned range of the variance
    log_posterior_variance: float | Tensor  # lower end


@dataclass(frozen=True, eq=False)
class Schedule:
    """A diffusion chain. Index 0 is the least noisy timestep, index T - 1 the noisiest.

    betas: float64 [T], in (0, 1); the last one may be 1, and the chain then starts from pure noise.
    timestep_map: int64 [T], each index's timestep in the schedule the model was trained on.
    """

    betas: FloatArray
    timestep_map: IntArray

    @property
    def num_timesteps(self) -> int:
        """T, the length of this chain: after respacing, the number of sampling steps."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> FloatArray:
        """Remaining share of the signal's variance at each timestep, [T] (Ho 2020, above eq. 4)."""
        cumulative: FloatArray = np.cumprod(1.0 - self.betas, dtype=np.float64)
        return cumulative

    @cached_property
    def alphas_cumprod_prev(self) -> FloatArray:
        """alphas_cumprod one step closer to the data, 1 at the data itself, [T]."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def posterior_variance(self) -> FloatArray:
        """Variance of q(x_{t-1} | x_t, x_0), [T], 0 at t = 0 (Ho 2020, eq. 7)."""
        variance: FloatArray = self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        return variance

    @cached_property
    def posterior_log_variance_clipped(self) -> FloatArray:
        """Logarithm of the posterior variance, [T]; at t = 0, where the variance is 0, the value of t = 1."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def coefficients(self) -> FloatArray:
        """The fields of `Coefficients` for every timestep, [7, T]."""
        ab, ab_prev = self.alphas_cumprod, self.alphas_cumprod_prev
        rows = {
            "signal_scale": np.sqrt(ab),
            "noise_scale": np.sqrt(1.0 - ab),
            "snr": ab / (1.0 - ab),
            "posterior_start": np.sqrt(ab_prev) * self.betas / (1.0 - ab),
            "posterior_current": np.sqrt(1.0 - self.betas) * (1.0 - ab_prev) / (1.0 - ab),
            "log_beta": np.log(self.betas),
            "log_posterior_variance": self.posterior_log_variance_clipped,
        }
        return np.stack([rows[name] for name in Coefficients._fields])

    def at(self, index: int) -> Coefficients:
        """The coefficients of one timestep as Python floats, for a batch that shares it."""
        return Coefficients(*self.coefficients[:, index].tolist())

    def gather(self, t: Tensor, ndim: int) -> Coefficients:
        """The coefficients at a timestep per sample, t int64 [N]: float32 [N, 1, ...], `ndim` dimensions."""
        rows = _coefficients_on(self, t.device)[:, t]
        return Coefficients(*rows.reshape(len(rows), -1, *(1,) * (ndim - 1)))


@lru_cache(maxsize=16)
def _coefficients_on(schedule: Schedule, device: torch.device) -> Tensor:
    """The table of coefficients on a device, copied there once. Schedules are compared by identity."""
    with torch.inference_mode(False):  # a table that sampling creates must be usable in training
        return torch.from_numpy(schedule.coefficients).float().to(device)


def linear_schedule(num_timesteps: int = 1000) -> Schedule:
    """The linear schedule of Ho 2020 (section 4): beta from 1e-4 to 0.02 over 1000 timesteps.

    With another number of timesteps the betas are scaled by 1000 / num_timesteps, so that the noise at the
    end of the chain stays about the same. Raises UserError if a beta would become 1 or more.
    """
    if num_timesteps <= 20:
        raise UserError(
            f"num_timesteps is {num_timesteps}: the linear schedule needs more than 20, because its "
            "last beta is 20 / num_timesteps and must stay below 1. "
            "To sample in few steps, train with 1000 and respace."
        )
    scale = 1000 / num_timesteps
    betas = np.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=np.float64)
    return Schedule(betas, np.arange(num_timesteps, dtype=np.int64))


def spaced_timesteps(num_timesteps: int, num_sampling_steps: int, spacing: Spacing = "ends") -> IntArray:
    """`num_sampling_steps` evenly spaced timesteps of 0..num_timesteps - 1, ascending, int64.

    "ends" includes both ends, as in Nichol & Dhariwal 2021, section 4. "trailing" divides the chain into equal parts
    and takes the noisiest timestep of each (Lin et al. 2024, arXiv 2305.08891, table 2): the last step then covers as
    much of the chain as any other. Raises UserError outside 2..num_timesteps.
    """
    if not 2 <= num_sampling_steps <= num_timesteps:
        raise UserError(
            f"num_sampling_steps is {num_sampling_steps}, but a chain of {num_timesteps} timesteps takes "
            f"2 to {num_timesteps} steps. Choose a number in that range."
        )
    if spacing == "trailing":
        parts = np.arange(1, num_sampling_steps + 1, dtype=np.int64)
        return (2 * num_timesteps * parts + num_sampling_steps) // (2 * num_sampling_steps) - 1  # rounded in integers
    stride = np.full(num_sampling_steps - 1, (num_timesteps - 1) / (num_sampling_steps - 1))
    positions = np.append(0.0, np.cumsum(stride))  # cumulative sums, so that halves round as in published results
    return np.rint(positions).astype(np.int64)


def respace(schedule: Schedule, num_sampling_steps: int, spacing: Spacing = "ends") -> Schedule:
    """The shorter chain that visits `num_sampling_steps` of a schedule's timesteps.

    It has the same alphas_cumprod at these timesteps; its betas follow from them (Nichol & Dhariwal 2021, eq. 19).
    Spacing and errors are those of `spaced_timesteps`.
    """
    timesteps = spaced_timesteps(schedule.num_timesteps, num_sampling_steps, spacing)
    ab = schedule.alphas_cumprod[timesteps]
    return Schedule(1.0 - ab / np.append(1.0, ab[:-1]), schedule.timestep_map[timesteps])
