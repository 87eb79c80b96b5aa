"""What a model learns to predict, and everything that follows from it: the door to another objective.

An objective noises data, draws times, scores a model's output in training, and reads that output in sampling.
Training, samplers, previews and diffusers' schedulers ask it for all of these and assume nothing of their own. The
objectives that exist are registered in `edt_core.diffusion.objectives`.

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
        """What is trained on, [N]: the sum of the terms."""
        return reduce(add, self.terms.values())


@dataclass(frozen=True, eq=False)
class Prediction:
    """A model's output, cut into its parts, float32 [N, C, H, W] each.

    value: what the objective has the model predict: noise, v and so on.
    variance: where the variance lies between its bounds; None where the model predicts none.
    """

    value: Tensor
    variance: Tensor | None = None


class Objective(ABC):
    """One objective; it has no state.

    name: what `train.objective` and a model's configuration call it.
    meaning: what the model predicts, in a few words, for the model card.
    prediction_type: what diffusers' schedulers call it.
    words: how the training options of a checkpoint from elsewhere name it, in lower case: the value of an option such
        as `prediction_type`, or an option that is true. Those of epsilon are known to `edt_core.models`.
    outputs: how many tensors of the latents' shape the model's output holds, one after the other along the channels.
    terms: names of the terms of its loss.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    prediction_type: ClassVar[str]
    words: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[int]
    terms: ClassVar[tuple[str, ...]]

    def schedule(self, num_timesteps: int) -> Schedule:
        """The chain of noise levels that a model is trained on. Raises UserError for too few timesteps."""
        return linear_schedule(num_timesteps)

    def times(self, choice: TimestepChoice, num_timesteps: int) -> TimestepSampler:
        """What draws the timesteps of a training's samples."""
        sampler = LossSecondMomentSampler if choice == "loss-second-moment" else UniformSampler
        return sampler(num_timesteps)

    @abstractmethod
    def noised(self, schedule: Schedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The data with the noise of timestep t, float32 [N, C, H, W]: what the model gets in training."""

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
        """The losses of each sample for what the model made of (x_t, t); `x_t` is what `noised` gave.

        `min_snr_gamma`: Min-SNR weight of the squared error (arXiv 2303.09556); None for none.
        Raises ValueError for a shape that does not fit.
        """

    @abstractmethod
    def split(self, model_output: Tensor, num_channels: int) -> Prediction:
        """A model's output in its parts. Raises ValueError where it has not the channels that this needs."""

    @abstractmethod
    def x_start(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The x_0 that a predicted value [N, C, H, W] implies."""

    @abstractmethod
    def noise(self, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
        """The noise that a predicted value [N, C, H, W] implies."""

    @abstractmethod
    def log_variance(self, prediction: Prediction, c: Coefficients) -> Tensor:
        """The log variance of p(x_{t-1} | x_t), for the ancestral chain."""
