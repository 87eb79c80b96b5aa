"""From noise to latents: the ancestral chain, DDIM, and multistep solvers.

Shapes: x [N, C, H, W] float32. The timestep of a step is the same for the whole batch, so its coefficients
are floats.
References: Ho et al. 2020 (arXiv 2006.11239), Song et al. 2021 (DDIM, arXiv 2010.02502).
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from edt_core.diffusion import equations
from edt_core.diffusion.chain import ModelFn, NoiseFn, SwitchedModel, model_at
from edt_core.diffusion.objective import Objective, Prediction, ScheduledObjective
from edt_core.diffusion.schedule import Schedule, respace
from edt_core.diffusion.solvers import SolverName, multistep
from edt_core.errors import UserError

SamplingMethod = Literal["ancestral", "ddim"] | SolverName
METHODS: tuple[str, ...] = ("ancestral", "ddim", *get_args(SolverName))

# (index of the schedule, x_t, prediction, noise or None) -> x_{t-1}
_Step = Callable[[int, Tensor, Prediction, Tensor | None], Tensor]


def sampling_schedule(schedule: Schedule, num_sampling_steps: int, method: SamplingMethod = "ancestral") -> Schedule:
    """The timesteps that a method visits, spread over a training's schedule. Raises as `respace`.

    The ancestral chain and DDIM end at timestep 0, as in published results. The solvers work best with even steps in
    the log of the signal-to-noise ratio, on which timestep 0 of the linear schedule is far away: the step to it would
    be as long as all others of the second half, and their second order would be lost. So with "trailing" they go from
    the end of the last part directly to the data.
    """
    return respace(schedule, num_sampling_steps, "trailing" if method in get_args(SolverName) else "ends")


@torch.no_grad()
def sample(
    model_fn: ModelFn | SwitchedModel,
    initial: Tensor,
    schedule: Schedule,
    method: SamplingMethod = "ancestral",
    *,
    objective: Objective,
    noise: NoiseFn | None = None,
    eta: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run the whole chain from `initial`, standard normal [N, C, H, W], and return x_0, float32 [N, C, H, W].

    The steps are those of `schedule`, see `sampling_schedule`. model_fn gets the timesteps the model was trained on,
    not the indices of a respaced schedule. `objective` is the one the model was trained for; it interprets the model's
    output.
    noise(step) returns the noise of a step, counted from 0 at the noisiest; the last step needs none. DDIM needs
    noise only if `eta` (0: deterministic, 1: as random as the ancestral chain) is above 0, the solvers never.
    progress(done, total) is called after each step.
    The predicted x_0 is not clipped: latents have no fixed range.
    Raises UserError for an unknown method, an eta outside 0..1 or without DDIM, missing noise, and an objective that
    has no noise schedule.
    """
    _check_method(method, noise, eta)
    if not isinstance(objective, ScheduledObjective):
        raise UserError(
            f"method {method!r} needs a noise schedule, and a model of the objective {objective.name!r} has none. "
            f"Choose one of {', '.join(objective.samplers)}."
        )
    x = initial.float()
    total = schedule.num_timesteps
    step_fn = _step_of(objective, schedule, method, eta)
    random = method == "ancestral" or eta > 0.0
    for step in range(total):
        index = total - 1 - step
        timestep = int(schedule.timestep_map[index])
        t = torch.full((len(x),), timestep, dtype=torch.int64, device=x.device)
        prediction = objective.split(model_at(model_fn, timestep)(x, t), x.shape[1])
        step_noise = noise(step).to(x) if noise is not None and random and index > 0 else None
        x = step_fn(index, x, prediction, step_noise)
        if progress is not None:
            progress(step + 1, total)
    return x


def _step_of(objective: ScheduledObjective, schedule: Schedule, method: SamplingMethod, eta: float) -> _Step:
    """The step of a method. A solver's step is for one chain only, since it remembers earlier steps."""
    if method == "ancestral":
        return lambda index, x, prediction, noise: ancestral_step(objective, schedule, index, x, prediction, noise)
    if method == "ddim":
        return lambda index, x, prediction, noise: ddim_step(objective, schedule, index, x, prediction, eta, noise)
    solver_step = multistep(schedule, method, objective.prediction_type)
    return lambda index, x, prediction, noise: solver_step(x, prediction.value)


def ancestral_step(
    objective: ScheduledObjective,
    schedule: Schedule,
    index: int,
    x_t: Tensor,
    prediction: Prediction,
    noise: Tensor | None,
) -> Tensor:
    """A draw of p(x_{t-1} | x_t) with the model's variance (Ho 2020, algorithm 2); the mean if `noise` is None."""
    c = schedule.at(index)
    mean = equations.posterior_mean(objective.x_start(prediction.value, x_t, c), x_t, c)
    if noise is None:
        return mean
    return mean + torch.exp(0.5 * objective.log_variance(prediction, c)) * noise


def ddim_step(
    objective: ScheduledObjective,
    schedule: Schedule,
    index: int,
    x_t: Tensor,
    prediction: Prediction,
    eta: float,
    noise: Tensor | None,
) -> Tensor:
    """One step of DDIM (Song 2021, eq. 12); its mean if `noise` is None."""
    c = schedule.at(index)
    ab_prev = float(schedule.alphas_cumprod_prev[index])
    sigma = ddim_sigma(schedule, index, eta)
    x_start = objective.x_start(prediction.value, x_t, c)
    direction = math.sqrt(max(1.0 - ab_prev - sigma**2, 0.0))
    x = math.sqrt(ab_prev) * x_start + direction * objective.noise(prediction.value, x_t, c)
    return x if noise is None else x + sigma * noise


def ddim_sigma(schedule: Schedule, index: int, eta: float) -> float:
    """The standard deviation of DDIM's noise (Song 2021, eq. 16): eta times that of the posterior."""
    return eta * math.sqrt(float(schedule.posterior_variance[index]))


def _check_method(method: str, noise: NoiseFn | None, eta: float) -> None:
    if method not in METHODS:
        raise UserError(f"unknown sampling method {method!r}. Choose one of {', '.join(METHODS)}.")
    if not 0.0 <= eta <= 1.0 or (method != "ddim" and eta != 0.0):
        raise UserError(
            f"eta is {eta} with method {method!r}: eta is DDIM's share of noise, between 0 and 1. "
            "Leave it at 0 for every other method."
        )
    if noise is None and (method == "ancestral" or eta > 0.0):
        raise UserError(
            f"method {method!r} with eta {eta} needs noise at each step. Pass noise=, for example a SampleNoise."
        )
