"""Diffusion: the linear schedule, objectives, samplers."""

from edt_core.diffusion.chain import Chain, SwitchedModel
from edt_core.diffusion.guidance import guided
from edt_core.diffusion.noise import SampleNoise, sample_noise
from edt_core.diffusion.objective import Losses, Objective, SamplerChoice
from edt_core.diffusion.objectives import (
    OBJECTIVES,
    check_training,
    objective_of,
    objective_of_model,
    objective_words,
    only_objective,
    train_defaults,
    with_objective,
)
from edt_core.diffusion.sampling import sample, sampling_schedule
from edt_core.diffusion.schedule import Schedule, linear_schedule, respace
from edt_core.diffusion.timesteps import (
    LossSecondMomentSampler,
    TimestepDraw,
    TimestepSampler,
    UniformSampler,
)

__all__ = [
    "OBJECTIVES",
    "Chain",
    "LossSecondMomentSampler",
    "Losses",
    "Objective",
    "SampleNoise",
    "SamplerChoice",
    "Schedule",
    "SwitchedModel",
    "TimestepDraw",
    "TimestepSampler",
    "UniformSampler",
    "check_training",
    "guided",
    "linear_schedule",
    "objective_of",
    "objective_of_model",
    "objective_words",
    "only_objective",
    "respace",
    "sample",
    "sample_noise",
    "sampling_schedule",
    "train_defaults",
    "with_objective",
]
