"""Schedulers of diffusers in a pipeline: the one that a folder is written with, and others that a user may assign.

With the former, a pipeline uses the samplers of this package. Any other scheduler runs its own chain here.
Shapes: N samples, C latent channels, h side of the latents.
"""

import inspect
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from edt_core.diffusion import Objective, SwitchedModel
from edt_core.diffusion.chain import ModelFn, model_at
from edt_core.errors import UserError
from edt_core.sampling import flow_schedulers
from edt_core.sampling.sampler import Progress
from edt_core.sampling.token_schedulers import TokenScheduler

# Of objectives on a noise schedule. All are tested. If they draw noise, they draw it from the call's generator.
SUPPORTED = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
_LEARNED = ("learned", "learned_range")
_TOLERANCE = 1e-4  # of alphas_cumprod: diffusers computes them in float32, by several formulas
Generators = torch.Generator | list[torch.Generator] | None


def training_scheduler(num_timesteps: int, objective: Objective, time_shift: float = 1.0) -> Any:
    """The scheduler that a pipeline is written with: noise schedule and objective of the training, for diffusers.

    `time_shift` is that of the sampling protocol, for continuous times.
    """
    if objective.of_tokens:
        return TokenScheduler(num_train_timesteps=num_timesteps)
    if objective.continuous:
        return flow_schedulers.training_scheduler(num_timesteps, time_shift)
    return DDPMScheduler(
        num_train_timesteps=num_timesteps,
        beta_schedule="linear",
        beta_start=0.0001 * 1000 / num_timesteps,
        beta_end=0.02 * 1000 / num_timesteps,
        variance_type="learned_range",
        prediction_type=objective.prediction_type,
        clip_sample=False,
    )


def is_training_scheduler(scheduler: Any, num_timesteps: int, objective: Objective, time_shift: float = 1.0) -> bool:
    """Whether a scheduler is that of `training_scheduler`; a pipeline then uses the samplers of this package."""
    kind, expected = _training_config(num_timesteps, objective, time_shift)
    return type(scheduler) is kind and all(scheduler.config.get(name) == value for name, value in expected.items())


@lru_cache(maxsize=16)
def _training_config(num_timesteps: int, objective: Objective, time_shift: float) -> tuple[type[Any], dict[str, Any]]:
    scheduler = training_scheduler(num_timesteps, objective, time_shift)
    return type(scheduler), {name: value for name, value in scheduler.config.items() if name[0] != "_"}


def check_scheduler(scheduler: Any, num_timesteps: int, objective: Objective) -> None:
    """Raise UserError for a scheduler that cannot sample from a model of this training."""
    problem: str | None
    if objective.of_tokens:
        problem = "it is not the pipeline's own, and the model predicts codes"
    elif objective.continuous:
        problem = flow_schedulers.problem(scheduler)
    else:
        problem = _problem(scheduler, num_timesteps, objective)
    if problem is not None:
        raise UserError(
            f"{type(scheduler).__name__} cannot sample from this model: {problem}. Create it from the pipeline's "
            "scheduler, SCHEDULER.from_config(pipeline.scheduler.config), or keep that scheduler and use the option "
            f"sampler, one of {', '.join(map(repr, objective.samplers))}: pipeline(labels, "
            f"sampler={objective.samplers[-1]!r})"
        )


def _problem(scheduler: Any, num_timesteps: int, objective: Objective) -> str | None:
    config = getattr(scheduler, "config", {})
    prediction_type, expected = config.get("prediction_type"), objective.prediction_type
    problem = None
    if type(scheduler).__name__ not in SUPPORTED:
        problem = f"it is not one of {', '.join(SUPPORTED)}"
    elif prediction_type != expected:
        problem = f"its prediction_type is {prediction_type!r}, but the model predicts {expected!r}"
    elif clipping := [field for field in ("clip_sample", "thresholding") if config.get(field)]:
        problem = f"{clipping[0]} is True, but latents have no fixed range and would be clipped"
    elif not _has_schedule_of(scheduler, num_timesteps, objective):
        problem = f"its noise schedule is not the linear one of {num_timesteps} timesteps that the model was trained on"
    return problem


def _has_schedule_of(scheduler: Any, num_timesteps: int, objective: Objective) -> bool:
    schedule = objective.schedule(num_timesteps)
    assert schedule is not None  # not continuous
    expected = schedule.alphas_cumprod
    alphas = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)
    return alphas.shape == expected.shape and np.allclose(alphas, expected, rtol=_TOLERANCE, atol=0)


class SchedulerChain:
    """One chain of a diffusers scheduler, a `Solver` of `LatentSampler.from_noise`.

    It uses a copy of the scheduler. Schedulers with noise draw it from `generator`: one for the batch, or one for each
    sample.
    """

    def __init__(
        self, scheduler: Any, objective: Objective, num_steps: int, device: torch.device, generator: Generators
    ) -> None:
        self._objective = objective
        self._generator = generator
        self._takes_variance = scheduler.config.get("variance_type") in _LEARNED and type(scheduler) is DDPMScheduler
        # DPM's solvers use no learned variance; to remove it they would keep only three channels of the prediction.
        unused = "variance_type" in scheduler.config and type(scheduler) is not DDPMScheduler
        self._scheduler = type(scheduler).from_config(scheduler.config, **({"variance_type": None} if unused else {}))
        self._scheduler.set_timesteps(num_steps, device=device)

    def __len__(self) -> int:
        return len(self._scheduler.timesteps)

    def __call__(self, model_fn: ModelFn | SwitchedModel, initial: Tensor, progress: Progress | None = None) -> Tensor:
        """Latents, float32 [N, C, h, h], of standard normal noise [N, C, h, h].

        A DDPMScheduler configured for a learned variance gets that of the model.
        """
        scheduler = self._scheduler
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": self._generator} if takes_generator else {}
        x = initial.float() * scheduler.init_noise_sigma
        for step, t in enumerate(scheduler.timesteps, start=1):
            model = model_at(model_fn, float(t))
            output = model(scheduler.scale_model_input(x, t), t.to(x.device).expand(len(x)))
            prediction = self._objective.split(output, x.shape[1])
            value = prediction.value
            if self._takes_variance and prediction.variance is not None:
                value = torch.cat([value, prediction.variance], dim=1)
            x = scheduler.step(value, t, x, return_dict=False, **options)[0]
            if progress is not None:
                progress(step, len(self))
        return x
