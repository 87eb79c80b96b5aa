"""The interface of an objective: what a model learns to predict, and everything that depends on it.

An objective noises data, draws times, computes the loss of a model's output in training, and interprets that output in
sampling. Training, samplers, previews and diffusers' schedulers get all of this from the objective. Objectives are
registered in `edt_core.diffusion.objectives`.

Shapes: x_start, noise, x_t [N, C, H, W]; model_output [N, outputs * C, H, W]; t [N], times in the objective's own form:
int64 indices of a noise schedule, or float32 numbers in [0, 1] of a continuous one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edt_core.diffusion.chain import Chain, Leap
from edt_core.diffusion.schedule import Coefficients, Schedule, linear_schedule
from edt_core.diffusion.timesteps import (
    LogitNormalSampler,
    LossSecondMomentSampler,
    TimestepSampler,
    UniformSampler,
    middle_timesteps,
)
from edt_core.errors import UserError
from edt_core.models import ModelConfig

if TYPE_CHECKING:
    from edt_core.config import ChainConfig, TrainConfig

TimestepChoice = Literal["loss-second-moment", "uniform", "logit-normal"]
SdeDiffusion = Literal["sigma", "sbdm"]


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler by its name, and its settings, which only some samplers have."""

    name: str
    time_shift: float = 1.0
    sde_diffusion: SdeDiffusion = "sigma"
    temperature: float = 1.0

    @classmethod
    def of(cls, chain: "ChainConfig") -> "SamplerChoice":
        """That of a sampling configuration."""
        return cls(chain.sampler, chain.time_shift, chain.sde_diffusion, chain.temperature)


@dataclass(frozen=True, eq=False)
class Losses:
    """The named terms of the loss of each sample, float32 [N] each, in the order of the objective's `terms`."""

    terms: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """One term, [N]."""
        return self.terms[name]

    @property
    def loss(self) -> Tensor:
        """The loss to minimise, [N]: the sum of the terms."""
        return reduce(add, self.terms.values())


@dataclass(frozen=True, eq=False)
class Prediction:
    """A model's output, split into its parts, float32 [N, C, H, W] each.

    value: the objective's prediction, such as noise or v.
    variance: the variance's position between its bounds; None if the model predicts none.
    """

    value: Tensor
    variance: Tensor | None = None


class Objective(ABC):
    """One objective; it has no state.

    name: its name in `train.objective` and in a model's configuration.
    meaning: what the model predicts, in a few words, for the model card.
    prediction_type: its name in diffusers' schedulers.
    words: its names, in lower case, in the training options of other code: values of an option such as
        `prediction_type`, or names of an option that is true. Those of epsilon are in `edt_core.models`.
    outputs: number of tensors of the latents' shape in the model's output, concatenated along the channels.
    terms: names of the terms of its loss; the first one is the squared error.
    continuous: whether its times are numbers in [0, 1], and not indices of a noise schedule.
    of_tokens: whether a model predicts codes, with a logit each, and not numbers; only families made for it do.
    samplers: names of its samplers; the first one is the default.
    preview_sampler: the one of previews: deterministic, and good in few steps.
    train_defaults: fields of `train` whose defaults differ from those of the schema.
    chain_defaults: fields of the sampling configuration, beside `sampler`, whose defaults differ.
    released_chain: fields of the sampling configuration for released models of this objective.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    prediction_type: ClassVar[str]
    words: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[int]
    terms: ClassVar[tuple[str, ...]]
    continuous: ClassVar[bool]
    of_tokens: ClassVar[bool] = False
    samplers: ClassVar[tuple[str, ...]]
    preview_sampler: ClassVar[str]
    train_defaults: ClassVar[Mapping[str, Any]] = {}
    chain_defaults: ClassVar[Mapping[str, Any]] = {}
    released_chain: ClassVar[Mapping[str, Any]] = {}

    # Times

    @abstractmethod
    def schedule(self, num_timesteps: int) -> Schedule | None:
        """The noise schedule of the training; None if there is none. Raises UserError for too few timesteps."""

    @abstractmethod
    def times(self, choice: TimestepChoice, num_timesteps: int, shift: float = 1.0) -> TimestepSampler:
        """The sampler of a training's times. Raises UserError for a choice or a shift that the objective lacks."""

    @abstractmethod
    def end_of_time(self, num_timesteps: int) -> float:
        """The upper bound of the times, which begin at 0."""

    @abstractmethod
    def measured_times(self, count: int, num_timesteps: int) -> NDArray[Any]:
        """The middles of `count` equal parts of the times, [count], from the least noise."""

    @abstractmethod
    def parts(self, times: NDArray[Any], count: int, num_timesteps: int) -> NDArray[np.int64]:
        """The part of each of the times [B], int64 [B], of `count` equal ones, from the least noise."""

    @abstractmethod
    def progress(self, t: Tensor, num_timesteps: int) -> Tensor:
        """The share of the way from noise to data at times t [N], float32 [N]."""

    @abstractmethod
    def cleaner(self, t: Tensor, share: Tensor, num_timesteps: int) -> Tensor:
        """Times with less noise than t [N], by `share` [N] of the whole way, but not beyond the cleanest time."""

    # Training

    @abstractmethod
    def check_training(self, min_snr_gamma: float | None) -> None:
        """Raise UserError for a weight of the loss that the objective lacks."""

    def check_recipe(self, config: "TrainConfig") -> None:  # noqa: B027  most objectives have no further limits
        """Raise UserError for another part of a training recipe that the objective does not support."""

    @abstractmethod
    def noised(self, schedule: Schedule | None, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The model's input in training: the data noised to time t, float32 [N, C, H, W]."""

    @abstractmethod
    def losses(
        self,
        schedule: Schedule | None,
        model_output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        min_snr_gamma: float | None,
    ) -> Losses:
        """The losses of each sample for the model's output at (x_t, t); `x_t` is the result of `noised`.

        `min_snr_gamma`: gamma of the min-SNR weight on the squared error (arXiv 2303.09556); None for no weight.
        Raises ValueError for shapes that do not match.
        """

    @abstractmethod
    def split(self, model_output: Tensor, num_channels: int) -> Prediction:
        """A model's output, split into its parts. Raises ValueError for a wrong number of channels."""

    # Sampling

    def denoised(self, schedule: Schedule | None, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data that a model's output at (x_t, t) implies, float32 [N, C, H, W].

        Raises UserError for an objective whose prediction implies none.
        """
        raise UserError(f"a model of the objective {self.name!r} predicts codes, which imply no latents")

    @abstractmethod
    def chain(self, num_timesteps: int, sampler: SamplerChoice, num_steps: int) -> Chain:
        """A sampler with `num_steps` steps. Raises UserError for one that the objective lacks, and invalid settings."""

    @abstractmethod
    def max_steps(self, num_timesteps: int) -> int | None:
        """The most steps of a chain; None for any number."""

    def calls(self, sampler: str, num_steps: int) -> int:
        """How often a chain without guidance calls the model."""
        return num_steps

    def leap_times(self, num_timesteps: int, sampler: SamplerChoice, num_steps: int, parts: int) -> NDArray[Any]:
        """The times of a deterministic chain of `num_steps` steps, each in `parts`, from noise to data.

        [num_steps, parts + 1]: the last time of a row is the first one of the next. Raises UserError for an objective
        without a deterministic sampler, for another sampler than that, and for more times than there are.
        """
        raise UserError(
            f"train.distill is set, but the objective {self.name!r} has no deterministic sampler, whose steps a "
            "student could learn; distill a model that predicts epsilon, v_prediction or flow"
        )

    def leap(self, schedule: Schedule | None, t: Tensor, s: Tensor) -> Leap:
        """The deterministic step between times of `leap_times`, from t [N] to s [N]."""
        raise NotImplementedError(self.name)  # `leap_times` has refused

    def leap_weight(self, schedule: Schedule | None, t: Tensor) -> Tensor:
        """The factor [N] on the squared error of a student's prediction at times t [N]."""
        raise NotImplementedError(self.name)

    @property
    def usual_chain(self) -> dict[str, Any]:
        """The fields of the sampling configuration where none are given."""
        return {"sampler": self.samplers[0], **self.chain_defaults}

    def check_chain(self, chain: "ChainConfig", model: ModelConfig) -> None:  # noqa: B027  most have no further limits
        """Raise UserError for further settings of a chain that a model of this objective does not have."""

    def check_sampler(self, sampler: SamplerChoice) -> None:
        """Raise UserError for a sampler of another objective, and for settings that it does not have."""
        if sampler.name not in self.samplers:
            raise UserError(
                f"sampler is {sampler.name!r}, but a model of the objective {self.name!r} is sampled by one of "
                f"{', '.join(self.samplers)}; set sampler to one of these"
            )
        if sampler.temperature != 1.0 and not self.of_tokens:
            raise UserError(
                f"temperature is {sampler.temperature:g}, but only masked tokens are drawn with one, and the objective "
                f"is {self.name!r}; set temperature to 1"
            )


class ContinuousObjective(Objective):
    """An objective whose times are numbers in [0, 1], with the data at 1, and no noise schedule."""

    continuous: ClassVar[bool] = True

    def schedule(self, num_timesteps: int) -> None:
        """None: nothing is read from a table."""

    def end_of_time(self, num_timesteps: int) -> float:
        """1, the data."""
        return 1.0

    def measured_times(self, count: int, num_timesteps: int) -> NDArray[Any]:
        """The middles of equal parts of [0, 1], float32 [count], without a shift."""
        return (1 - (2 * np.arange(count) + 1) / (2 * count)).astype(np.float32)

    def parts(self, times: NDArray[Any], count: int, num_timesteps: int) -> NDArray[np.int64]:
        """The part of each time."""
        noise_share = 1 - times.astype(np.float64)
        return np.minimum((noise_share * count).astype(np.int64), count - 1)

    def progress(self, t: Tensor, num_timesteps: int) -> Tensor:
        """The time itself."""
        return t.float()

    def cleaner(self, t: Tensor, share: Tensor, num_timesteps: int) -> Tensor:
        """Later times, up to the data."""
        return (t.float() + share).clamp(max=1.0)


class ScheduledObjective(Objective):
    """An objective on a noise schedule: its prediction at a timestep determines x_0 and the noise.

    Its times are timesteps, indices of the schedule from the least noise.
    """

    continuous = False

    def schedule(self, num_timesteps: int) -> Schedule:
        """The linear schedule. Raises UserError for too few timesteps."""
        return linear_schedule(num_timesteps)

    def times(self, choice: TimestepChoice, num_timesteps: int, shift: float = 1.0) -> TimestepSampler:
        """The sampler of a training's timesteps. Raises UserError for a shift."""
        check_no_shift(self.name, shift)
        if choice == "loss-second-moment":
            return LossSecondMomentSampler(num_timesteps)
        return LogitNormalSampler(num_timesteps) if choice == "logit-normal" else UniformSampler(num_timesteps)

    def end_of_time(self, num_timesteps: int) -> float:
        """The number of timesteps."""
        return num_timesteps

    def measured_times(self, count: int, num_timesteps: int) -> NDArray[Any]:
        """The middles of equal parts of the timesteps, rounded down, int64 [count]."""
        return middle_timesteps(count, num_timesteps)

    def parts(self, times: NDArray[Any], count: int, num_timesteps: int) -> NDArray[np.int64]:
        """The part of each timestep."""
        part: NDArray[np.int64] = times * count // num_timesteps
        return part

    def progress(self, t: Tensor, num_timesteps: int) -> Tensor:
        """1 - t / num_timesteps."""
        return 1 - t.float() / num_timesteps

    def cleaner(self, t: Tensor, share: Tensor, num_timesteps: int) -> Tensor:
        """Earlier timesteps, by a number that is rounded down."""
        return (t - (share * num_timesteps).long()).clamp(min=0)

    def check_training(self, min_snr_gamma: float | None) -> None:
        """Every weight is possible."""

    def max_steps(self, num_timesteps: int) -> int | None:
        """All timesteps."""
        return num_timesteps

    def denoised(self, schedule: Schedule | None, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 that the predicted value implies; `t` are timesteps of the training."""
        assert schedule is not None  # that of `schedule`
        value = self.split(model_output, x_t.shape[1]).value
        return self.x_start(value, x_t.float(), schedule.gather(t, x_t.ndim))

    @abstractmethod
    def x_start(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The x_0 that a predicted value [N, C, H, W] implies."""

    @abstractmethod
    def noise(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The noise that a predicted value [N, C, H, W] implies."""

    @abstractmethod
    def log_variance(self, prediction: Prediction, c: Coefficients) -> Tensor:
        """The log variance of p(x_{t-1} | x_t), for the ancestral chain."""


def check_shapes(x_start: Tensor, x_t: Tensor, noise: Tensor) -> None:
    """Raise ValueError unless data, noised data and noise have one shape."""
    if not x_start.shape == x_t.shape == noise.shape:
        raise ValueError(
            f"x_start {tuple(x_start.shape)}, x_t {tuple(x_t.shape)} and noise {tuple(noise.shape)} must "
            "have the same shape. Draw one noise tensor like x_start and compute x_t from it with `noised`."
        )


def check_no_shift(name: str, time_shift: float, cause: str = "has a noise schedule, whose timesteps") -> None:
    """Raise UserError for a shift of the times of an objective on a noise schedule, or whose times `cause` says."""
    if time_shift != 1.0:
        raise UserError(
            f"time_shift is {time_shift:g}, but the objective {name!r} {cause} are not shifted; set time_shift to 1"
        )
