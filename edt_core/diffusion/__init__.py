"""Diffusion: the linear schedule, objectives, samplers."""

from edt_core.diffusion.guidance import guided
from edt_core.diffusion.noise import SampleNoise, sample_noise
from edt_core.diffusion.objective import Losses, Objective
from edt_core.diffusion.objectives import OBJECTIVES, objective_of, objective_of_model, objective_words, with_objective
from edt_core.diffusion.sampling import SwitchedModel, sample, sampling_schedule
from edt_core.diffusion.schedule import Schedule, linear_schedule, respace
from edt_core.diffusion.timesteps import (
    LossSecondMomentSampler,
    TimestepDraw,
    TimestepSampler,
    UniformSampler,
)

__all__ = [
    "OBJECTIVES",
    "LossSecondMomentSampler",
    "Losses",
    "Objective",
    "SampleNoise",
    "Schedule",
    "SwitchedModel",
    "TimestepDraw",
    "TimestepSampler",
    "UniformSampler",
    "guided",
    "linear_schedule",
    "objective_of",
    "objective_of_model",
    "objective_words",
    "respace",
    "sample",
    "sample_noise",
    "sampling_schedule",
    "with_objective",
]
