"""Gaussian diffusion as EDT uses it: linear schedule, predicted noise, learned range of the variance."""

from edt_core.diffusion.guidance import guided
from edt_core.diffusion.losses import Losses, q_sample, training_losses
from edt_core.diffusion.noise import SampleNoise, sample_noise
from edt_core.diffusion.sampling import SwitchedModel, sample, sampling_schedule
from edt_core.diffusion.schedule import Schedule, linear_schedule, respace
from edt_core.diffusion.timesteps import (
    LossSecondMomentSampler,
    TimestepDraw,
    TimestepSampler,
    UniformSampler,
)

__all__ = [
    "LossSecondMomentSampler",
    "Losses",
    "SampleNoise",
    "Schedule",
    "SwitchedModel",
    "TimestepDraw",
    "TimestepSampler",
    "UniformSampler",
    "guided",
    "linear_schedule",
    "q_sample",
    "respace",
    "sample",
    "sample_noise",
    "sampling_schedule",
    "training_losses",
]
