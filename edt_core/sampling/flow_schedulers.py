"""Schedulers of diffusers for a model of flow matching.

They count time the other way: sigma = 1 - t is the share of the noise, their timesteps are sigma times
`num_train_timesteps`, and they integrate the velocity from data to noise. So the model gets t = 1 - timestep /
num_train_timesteps, and its velocity changes its sign.
Shapes: N samples, C latent channels, h side of the latents.
"""

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from edt_core.diffusion import Objective, SwitchedModel
from edt_core.diffusion.chain import ModelFn, model_at
from edt_core.sampling.sampler import Progress

# All of these are tested. If they draw noise, they draw it from the call's generator.
SUPPORTED = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_OTHER_TIMES = ("use_dynamic_shifting", "invert_sigmas")  # need a resolution, or a model of another convention
Generators = torch.Generator | list[torch.Generator] | None


def training_scheduler(num_timesteps: int, time_shift: float) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler that a pipeline is written with; its `shift` is the time shift of the sampling protocol."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_timesteps, shift=time_shift)


def problem(scheduler: Any) -> str | None:
    """Why a scheduler cannot sample from a model of flow matching; None if it can."""
    if type(scheduler).__name__ not in SUPPORTED:
        return f"it is not one of {', '.join(SUPPORTED)}, and the model predicts a velocity"
    if other := [name for name in _OTHER_TIMES if scheduler.config.get(name)]:
        return f"{other[0]} is True, and the model has no such times"
    return None


class FlowSchedulerChain:
    """One chain of a diffusers scheduler for flow matching, a `Solver` of `LatentSampler.from_noise`.

    It uses a copy of the scheduler. One that takes the noise levels of its steps gets those of `ode_times`, before its
    own shift, so that FlowMatchEulerDiscreteScheduler makes the steps of the sampler euler. Another one uses its own
    levels: N of them from 1 to that of the first timestep, which diffusers shifts twice.
    """

    def __init__(
        self, scheduler: Any, objective: Objective, num_steps: int, device: torch.device, generator: Generators
    ) -> None:
        self._objective, self._generator = objective, generator
        self._scheduler = type(scheduler).from_config(scheduler.config)
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            sigmas = 1.0 - np.arange(num_steps) / num_steps
            self._scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self._scheduler.set_timesteps(num_steps, device=device)

    def __len__(self) -> int:
        return len(self._scheduler.timesteps)

    def __call__(self, model_fn: ModelFn | SwitchedModel, initial: Tensor, progress: Progress | None = None) -> Tensor:
        """Latents, float32 [N, C, h, h], of standard normal noise [N, C, h, h]."""
        scheduler, x = self._scheduler, initial.float()
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": self._generator} if takes_generator else {}
        for step, timestep in enumerate(scheduler.timesteps, start=1):
            t = 1.0 - timestep.to(x.device) / scheduler.config.num_train_timesteps
            output = model_at(model_fn, float(t))(x, t.expand(len(x)))
            velocity = self._objective.split(output, x.shape[1]).value
            x = scheduler.step(-velocity, timestep, x, return_dict=False, **options)[0]
            if progress is not None:
                progress(step, len(self))
        return x
