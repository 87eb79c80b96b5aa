"""Samplers of flow matching: Euler and Heun for the ODE dx = v dt, Euler-Maruyama for an SDE of the same marginals.

v(x, t) is the velocity, t from 0 (noise) to 1 (data). The SDE is dx = (v + w s) dt + sqrt(2 w) dW with the score
s = (t v - x) / (1 - t), and any w(t) >= 0 (SiT, arXiv 2401.08740, section 2).
Shapes: x, v [N, C, H, W] float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from edt_core.diffusion.chain import Chain, ModelFn, NoiseFn, ProgressFn, SwitchedModel, model_at
from edt_core.diffusion.objective import SamplerChoice, SdeDiffusion
from edt_core.diffusion.timesteps import shifted
from edt_core.errors import UserError

LAST_STEP = 0.04  # length of the SDE's last step, which adds no noise: that of the published samples
SBDM_START = 1e-3  # the coefficient of SBDM is infinite at t = 0

# (velocity at a time, x, begin and end of the step, its noise or None) -> x at its end
_Step = Callable[[Callable[[Tensor, float], Tensor], Tensor, float, float, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Kind:
    """A sampler: calls of the model in each step, and whether all steps but the last draw noise."""

    calls: int = 1
    random: bool = False


CHAINS = {"euler": _Kind(), "heun": _Kind(calls=2), "sde": _Kind(random=True)}


def flow_chain(sampler: SamplerChoice, num_steps: int) -> Chain:
    """A sampler with `num_steps` steps between the times of `ode_times` or `sde_times`.

    A step uses the model function of the time where it begins, also for its second call.
    Raises UserError for fewer than two steps.
    """
    if num_steps < 2:
        raise UserError(f"num_sampling_steps is {num_steps}; use at least 2")
    if sampler.name != "sde":
        step: _Step = euler_step if sampler.name == "euler" else heun_step
        return Chain(num_steps, 0, partial(_run, step, ode_times(num_steps, sampler.time_shift)))
    times = sde_times(num_steps, sampler.time_shift, SBDM_START if sampler.sde_diffusion == "sbdm" else 0.0)
    return Chain(num_steps, num_steps - 1, partial(_run, partial(sde_step, sampler.sde_diffusion), times))


def ode_times(num_steps: int, time_shift: float = 1.0) -> list[float]:
    """The ends of equal steps from 0 to 1, num_steps + 1 times, then shifted towards noise."""
    times: list[float] = shifted(np.linspace(0.0, 1.0, num_steps + 1), time_shift).tolist()
    return times


def sde_times(num_steps: int, time_shift: float = 1.0, start: float = 0.0) -> list[float]:
    """The ends of num_steps - 1 equal steps from `start` to 0.96 and a last one to 1, then shifted towards noise.

    With 250 steps they are those of SiT's published samples.
    """
    steps = np.append(np.linspace(start, 1.0 - LAST_STEP, num_steps), 1.0)
    times: list[float] = shifted(steps, time_shift).tolist()
    return times


@torch.no_grad()
def _run(
    step: _Step,
    times: Sequence[float],
    model_fn: ModelFn | SwitchedModel,
    initial: Tensor,
    noise: NoiseFn | None,
    progress: ProgressFn | None,
) -> Tensor:
    """All steps between `times`. The noise is that of all steps but the last; None for an ODE."""
    x, total = initial.float(), len(times) - 1
    for number, (begin, end) in enumerate(pairwise(times)):
        velocity = partial(_velocity, model_at(model_fn, begin))
        step_noise = noise(number).to(x) if noise is not None and number < total - 1 else None
        x = step(velocity, x, begin, end, step_noise)
        if progress is not None:
            progress(number + 1, total)
    return x


def _velocity(model: ModelFn, x: Tensor, time: float) -> Tensor:
    return model(x, torch.full((len(x),), time, dtype=torch.float32, device=x.device)).float()


def euler_step(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, begin: float, end: float, noise: Tensor | None
) -> Tensor:
    """One step of Euler's method, of order 1."""
    return x + (end - begin) * velocity(x, begin)


def heun_step(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, begin: float, end: float, noise: Tensor | None
) -> Tensor:
    """One step of Heun's method, of order 2: the mean of the velocities at both ends."""
    length, first = end - begin, velocity(x, begin)
    return x + length / 2 * (first + velocity(x + length * first, end))


def sde_step(
    diffusion: SdeDiffusion,
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    begin: float,
    end: float,
    noise: Tensor | None,
) -> Tensor:
    """One step of Euler-Maruyama; its mean if `noise` is None. w is 1 - t (sigma), or (1 - t) / t (sbdm).

    Written with w / (1 - t), which is finite at t = 1: w s = w / (1 - t) (t v - x).
    """
    length, v = end - begin, velocity(x, begin)
    ratio = 1.0 if diffusion == "sigma" else 1.0 / begin
    mean = x + length * (v + ratio * (begin * v - x))
    return mean if noise is None else mean + math.sqrt(2 * ratio * (1 - begin) * length) * noise
