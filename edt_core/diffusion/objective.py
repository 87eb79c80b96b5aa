"""The interface of an objective: what a model learns to predict, and everything that depends on it.

An objective noises data, draws times, computes the loss of a model's output in training, and interprets that output in
sampling. Training, samplers, previews and diffusers' schedulers get all of this from the objective. Objectives are
registered in `edt_core.diffusion.objectives`.

Shapes: x_start, noise, x_t [N, C, H, W]; model_output [N, outputs * C, H, W]; t int64 [N], indices of the schedule.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, Literal

from torch import Tensor

from edt_core.diffusion.schedule import Coefficients, Schedule, linear_schedule
from edt_core.diffusion.timesteps import LossSecondMomentSampler, TimestepSampler, UniformSampler

TimestepChoice = Literal["loss-second-moment", "uniform"]


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
    terms: names of the terms of its loss.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    prediction_type: ClassVar[str]
    words: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[int]
    terms: ClassVar[tuple[str, ...]]

    def schedule(self, num_timesteps: int) -> Schedule:
        """The noise schedule of the training. Raises UserError for too few timesteps."""
        return linear_schedule(num_timesteps)

    def times(self, choice: TimestepChoice, num_timesteps: int) -> TimestepSampler:
        """The sampler of a training's timesteps."""
        sampler = LossSecondMomentSampler if choice == "loss-second-moment" else UniformSampler
        return sampler(num_timesteps)

    def cleaner(self, schedule: Schedule, t: Tensor, share: Tensor) -> Tensor:
        """Times with less noise than `t` [N], by `share` [N] of the whole chain, but not beyond its cleanest time."""
        return (t - (share * schedule.num_timesteps).long()).clamp(min=0)

    @abstractmethod
    def noised(self, schedule: Schedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The model's input in training: the data noised to timestep t, float32 [N, C, H, W]."""

    @abstractmethod
    def losses(
        self,
        schedule: Schedule,
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

    @abstractmethod
    def x_start(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The x_0 that a predicted value [N, C, H, W] implies."""

    @abstractmethod
    def noise(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The noise that a predicted value [N, C, H, W] implies."""

    @abstractmethod
    def log_variance(self, prediction: Prediction, c: Coefficients) -> Tensor:
        """The log variance of p(x_{t-1} | x_t), for the ancestral chain."""
