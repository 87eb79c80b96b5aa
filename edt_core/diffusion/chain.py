"""A sampler with its steps, as an objective makes it: from noise to latents.

Shapes: x [N, C, H, W] float32. All samples of a batch have the same time, so the coefficients of a step are floats.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

ModelFn = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], t [N]) -> the model's output for its objective
NoiseFn = Callable[[int], Tensor]  # step -> standard normal noise [N, C, H, W]
ProgressFn = Callable[[int, int], None]  # (completed steps, all steps)


@dataclass(frozen=True)
class SwitchedModel:
    """One model function for the times in the interval [from, to), another one for all others.

    A chain selects it by the time as a Python number: reading it from the device would make the host wait.
    """

    inside: ModelFn
    outside: ModelFn
    interval: tuple[float, float]

    def at(self, time: float) -> ModelFn:
        """The model function of a time."""
        return self.inside if self.interval[0] <= time < self.interval[1] else self.outside


def model_at(model_fn: ModelFn | SwitchedModel, time: float) -> ModelFn:
    """The model function of a time."""
    return model_fn.at(time) if isinstance(model_fn, SwitchedModel) else model_fn


@dataclass(frozen=True)
class Leap:
    """A step of a deterministic sampler from a time t to a time s of each sample: x_s = scale x_t + weight value.

    `value` is the objective's prediction at x_t, of which such a step is a linear function.
    Shapes: scale, weight [N, 1, 1, 1].
    """

    scale: Tensor
    weight: Tensor

    def end(self, x: Tensor, value: Tensor) -> Tensor:
        """x_s, [N, C, H, W]."""
        return self.scale * x + self.weight * value

    def value(self, x: Tensor, end: Tensor) -> Tensor:
        """The prediction with which the step leads from x to `end`, [N, C, H, W]. The weight must not be 0."""
        return (end - self.scale * x) / self.weight


@dataclass(frozen=True)
class Chain:
    """All steps of one sampler.

    `run(model_fn, initial, noise, progress)` returns latents float32 [N, C, H, W] of standard normal noise of that
    shape. `noise` is called for each of the first `noises` steps, in order; None if there are none. `progress` is
    called after each of the `steps`, and may be None.
    """

    steps: int
    noises: int
    run: Callable[[ModelFn | SwitchedModel, Tensor, NoiseFn | None, ProgressFn | None], Tensor]
