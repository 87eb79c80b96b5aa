"""The teacher of a distillation: one step of the student is what the teacher makes of it in several.

Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2), where the teacher makes two steps of each
step of the student, or more at once. It needs no second network to judge samples, and a student has the same inputs,
outputs and samplers as its teacher. A guided teacher is learnt at its own scale (Meng et al. 2023, arXiv 2210.03142),
so the student is not guided.

Legend: N = samples, C = latent channels, h = latent height and width, S = steps of the student, P = parts of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edt_core.diffusion import Losses, SamplerChoice, Schedule, SwitchedModel, guided, objective_of
from edt_core.diffusion.chain import ModelFn
from edt_core.diffusion.timesteps import GridSampler, TimestepSampler
from edt_core.errors import UserError
from edt_core.models import ModelConfig
from edt_core.models.zoo import build_model
from edt_core.sampling.sampler import LatentSampler
from edt_core.training.speed.arithmetic import set_arithmetic

if TYPE_CHECKING:
    from edt_core.config import TrainConfig


def training_times(config: TrainConfig) -> TimestepSampler:
    """The sampler of a training's times: of a distillation, those at which the student's steps begin."""
    objective = objective_of(config.objective)
    if config.distill is None:
        return objective.times(config.timestep_sampler, config.num_timesteps, config.time_shift)
    sampler, steps = SamplerChoice.of(config.distill.teacher), config.distill.steps
    return GridSampler(objective.leap_times(config.num_timesteps, sampler, steps, parts=1)[:, 0])


class Teacher:
    """A frozen model with its guidance and AMM, and the times [S, P + 1] of its steps on `device`."""

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig, weights: Mapping[str, Tensor], device: torch.device
    ) -> None:
        settings = config.distill
        assert settings is not None, "of a distillation"
        with torch.random.fork_rng(devices=[]):  # its initial weights are not used
            self.model = build_model(model_config)
        self.model.load_state_dict(weights)
        self.model.requires_grad_(False).to(device)
        set_arithmetic(self.model, config)
        self.sampler = LatentSampler(self.model, settings.teacher, config.num_timesteps)
        self.objective = objective_of(config.objective)
        choice = SamplerChoice.of(settings.teacher)
        times = self.objective.leap_times(config.num_timesteps, choice, settings.steps, settings.parts)
        self._times = torch.from_numpy(times).to(device)

    @torch.no_grad()
    def target(self, schedule: Schedule | None, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The prediction float32 [N, C, h, h] with which one step of the student leads to the end of the teacher's.

        t [N] are times at which the student's steps begin; labels int64 [N].
        """
        times = self._times[(self._times[:, :1] == t).int().argmax(dim=0)]  # [N, P + 1]
        model = self._guided(labels)
        x = x_t
        for begin, end in pairwise(times.unbind(dim=1)):
            value = self.objective.split(model(x, begin), x.shape[1]).value
            x = self.objective.leap(schedule, begin, end).end(x, value)
        return self.objective.leap(schedule, times[:, 0], times[:, -1]).value(x_t, x)

    def losses(self, schedule: Schedule | None, model_output: Tensor, target: Tensor, t: Tensor) -> Losses:
        """The weighted mean squared error [N] of the student's prediction, as the first term of the objective."""
        value = self.objective.split(model_output, target.shape[1]).value
        error = (value - target).square().flatten(1).mean(1)
        return Losses({self.objective.terms[0]: error * self.objective.leap_weight(schedule, t)})

    def _guided(self, labels: Tensor) -> ModelFn:
        """The model bound to labels, guided as the teacher's chain says."""
        chain = self.sampler.chain
        model = guided(
            self.model,
            labels,
            self.model.config.num_classes,
            chain.cfg_scale,
            chain.guidance_channels,
            interval=chain.guidance_interval,
            growth=self.sampler.growth,
        )
        return _at_each_time(model) if isinstance(model, SwitchedModel) else model


def _at_each_time(model: SwitchedModel) -> ModelFn:
    """A model that is guided in an interval, for a batch in which each sample has its own time."""
    first, last = model.interval

    def call(x: Tensor, t: Tensor) -> Tensor:
        inside = ((t >= first) & (t < last)).view(-1, 1, 1, 1)
        return torch.where(inside, model.inside(x, t), model.outside(x, t))

    return call


def teacher_of(
    config: TrainConfig, model_config: ModelConfig, weights: Mapping[str, Tensor] | None, device: torch.device
) -> Teacher | None:
    """The teacher with these weights; None for a training that learns from data. Raises UserError without weights."""
    if config.distill is None:
        return None
    if weights is None:
        raise UserError("train.distill is set, but there is no teacher: set train.init_from to a trained model")
    return Teacher(config, model_config, weights, device)


def teacher_flops(config: TrainConfig, macs: int) -> int:
    """Floating-point operations of the teacher for one image of a step, whose forward pass has so many MACs."""
    if config.distill is None:
        return 0
    calls = 1 if config.distill.teacher.cfg_scale == 1.0 else 2
    return 2 * macs * calls * config.distill.parts
