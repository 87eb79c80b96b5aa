"""Multistep solvers of the probability-flow ODE, from diffusers: as good in 20 steps as DDIM in hundreds.

References: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), UniPC (Zhao et al. 2023, arXiv 2302.04867), both of
second order in the prediction of x_0.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from edt_core.diffusion.schedule import Schedule

SolverName = Literal["dpmsolver++", "unipc"]


def multistep(schedule: Schedule, method: SolverName, prediction_type: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The step of one chain over `schedule`, noisiest first: (x_t, value), both float32 [N, C, H, W], -> x_{t-1}.

    The value is the objective's prediction, and `prediction_type` its name in diffusers. The last of
    schedule.num_timesteps calls returns x_0. The step remembers earlier calls: create one for each chain. The learned
    variance is not used, and x_0 is neither clipped nor thresholded. The steps' noise levels are on the CPU; with UniPC
    each step copies a few of them to the device and solves a 2 x 2 system there.
    """
    scheduler = _scheduler(schedule, method, prediction_type)
    timesteps = scheduler.timesteps.tolist()
    position = 0

    def step(x: Tensor, value: Tensor) -> Tensor:
        nonlocal position
        previous: Tensor = scheduler.step(value, timesteps[position], x, return_dict=False)[0]
        position += 1
        return previous

    return step


def _scheduler(schedule: Schedule, method: SolverName, prediction_type: str) -> Any:
    """A diffusers scheduler that visits every timestep of `schedule`, which is already respaced.

    diffusers can respace too, but computes with floats: for 62 numbers of steps below 1000 its "trailing" visits a
    timestep of -1, and its "linspace" visits one twice if all are visited.
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    steps = schedule.num_timesteps
    shared: dict[str, Any] = {
        "num_train_timesteps": steps,
        "trained_betas": schedule.betas.tolist(),
        "solver_order": 2,
        "prediction_type": prediction_type,
        # For a schedule that already ends in pure noise the only effect is that the last noise level stays finite.
        "rescale_betas_zero_snr": bool(schedule.alphas_cumprod[-1] == 0),
        "thresholding": False,
        "timestep_spacing": "trailing",  # `steps` out of `steps`: all timesteps
        "final_sigmas_type": "zero",  # the last step ends at the data, not at the lowest noise level of the training
    }
    if method == "dpmsolver++":
        scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **shared)
    else:
        scheduler = UniPCMultistepScheduler(**shared)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # otherwise the scheduler searches for the first timestep
    return scheduler
