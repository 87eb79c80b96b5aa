"""The timesteps of a training step, and the weights that keep the loss unbiased.

The draw is a pure function of the sampler's state and of uniform numbers from the caller. So that the timesteps of a
global batch do not depend on the number of workers, draw for the global batch, then slice.

Shapes: T timesteps, B samples of the global batch, H remembered losses per timestep.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class TimestepDraw(NamedTuple):
    """timesteps: int64 [B], or float32 [B] in [0, 1] on continuous time. weights: float32 [B].

    A weight is the factor on a sample's loss; its expectation is 1.
    """

    timesteps: NDArray[Any]
    weights: NDArray[np.float32]


class TimestepSampler(Protocol):
    """The interface of a timestep sampler to a training loop.

    `needs_losses`: whether a draw depends on the losses of the step before, so that a training has to wait for them.
    """

    needs_losses: ClassVar[bool]

    def draw(self, uniforms: ArrayLike) -> TimestepDraw: ...

    def update(self, timesteps: ArrayLike, losses: ArrayLike) -> None: ...

    def state_dict(self) -> dict[str, NDArray[Any]]: ...

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None: ...


def middle_timesteps(count: int, num_timesteps: int) -> IntArray:
    """The middles of `count` equal parts of the timesteps, rounded down, int64 [count]."""
    return (2 * np.arange(count) + 1) * num_timesteps // (2 * count)


def draw_timesteps(weights: FloatArray, uniforms: ArrayLike) -> TimestepDraw:
    """Timesteps with probability p_t proportional to weights [T], by inversion of uniforms [B] in [0, 1).

    The importance weight of timestep t is 1 / (T p_t). Raises ValueError for uniforms outside [0, 1).
    """
    u = checked_uniforms(uniforms)
    cumulative = np.cumsum(weights)
    cumulative /= cumulative[-1]
    timesteps = np.searchsorted(cumulative, u, side="right")
    importance = np.mean(weights) / weights[timesteps]
    return TimestepDraw(timesteps.astype(np.int64), importance.astype(np.float32))


def checked_uniforms(uniforms: ArrayLike) -> FloatArray:
    """Uniforms as float64 [B]. Raises ValueError if they are outside [0, 1)."""
    u = np.asarray(uniforms, dtype=np.float64)
    if u.ndim != 1 or not np.all((u >= 0.0) & (u < 1.0)):
        raise ValueError(
            f"uniforms of shape {u.shape} must be one number per sample in [0, 1). Draw them with "
            "numpy.random.Generator.random(global_batch_size)."
        )
    return u


def logit_normal(uniforms: ArrayLike) -> FloatArray:
    """Logit-normal(0, 1) numbers float64 [B] in [0, 1), by inversion of uniforms [B] (arXiv 2403.03206)."""
    normal = torch.special.ndtri(torch.from_numpy(checked_uniforms(uniforms)))
    numbers: FloatArray = torch.sigmoid(normal).numpy()
    return numbers


class UniformSampler:
    """Draws all timesteps with equal probability; all weights are 1. It has no state."""

    needs_losses: ClassVar[bool] = False

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def weights(self) -> FloatArray:
        """Unnormalised probability of each timestep, [T]."""
        return np.ones(self.num_timesteps)

    def draw(self, uniforms: ArrayLike) -> TimestepDraw:
        """Timesteps and weights for uniforms [B] in [0, 1)."""
        return draw_timesteps(self.weights(), uniforms)

    def update(self, timesteps: ArrayLike, losses: ArrayLike) -> None:
        """Do nothing: this sampler does not depend on losses."""

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """An empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Accept only the empty state. Raises ValueError for that of another sampler."""
        if state:
            raise ValueError(
                f"the saved timestep sampler has state {sorted(state)}, but the uniform sampler has none. Resume "
                "with the sampler of the original run."
            )


class LogitNormalSampler(UniformSampler):
    """Draws timesteps near the middle of the chain more often than those at its ends: logit-normal(0, 1).

    All weights are 1, so the loss counts the middle more: the draw is a weighting of the loss (arXiv 2403.03206,
    section 3.1), and not only a choice of samples. It has no state.
    """

    def draw(self, uniforms: ArrayLike) -> TimestepDraw:
        """Timesteps and weights for uniforms [B] in [0, 1)."""
        timesteps = np.floor(logit_normal(uniforms) * self.num_timesteps).astype(np.int64)
        return TimestepDraw(np.minimum(timesteps, self.num_timesteps - 1), np.ones(len(timesteps), np.float32))


def shifted(times: FloatArray, shift: float) -> FloatArray:
    """Times t in [0, 1] of a flow, 1 the data, shifted towards noise: n' = s n / (1 + (s - 1) n) with n = 1 - t.

    That is the shift of SD3 (arXiv 2403.03206) and RAE (arXiv 2510.11690), whose time is the share n of the
    noise. A shift of 1 changes nothing, not a bit.
    """
    return times if shift == 1.0 else times / (shift - (shift - 1.0) * times)


class ContinuousSampler(UniformSampler):
    """Draws times in [0, 1] of a flow; all weights are 1. It has no state.

    `curve` maps uniforms to times, by default each to itself; `shift` is applied to the result.
    """

    def __init__(
        self, curve: Callable[[ArrayLike], FloatArray] | None, shift: Callable[[FloatArray], FloatArray]
    ) -> None:
        self._curve = checked_uniforms if curve is None else curve
        self._shift = shift

    def draw(self, uniforms: ArrayLike) -> TimestepDraw:
        """Times float32 [B] and weights for uniforms [B] in [0, 1)."""
        times = self._shift(self._curve(uniforms)).astype(np.float32)
        return TimestepDraw(times, np.ones(len(times), np.float32))


class GridSampler(UniformSampler):
    """Draws one of a few times [n] with equal probability; all weights are 1. It has no state."""

    def __init__(self, times: NDArray[Any]) -> None:
        self._times = times

    def draw(self, uniforms: ArrayLike) -> TimestepDraw:
        """Times, of the dtype of the list, and weights for uniforms [B] in [0, 1)."""
        places = np.floor(checked_uniforms(uniforms) * len(self._times)).astype(np.int64)
        return TimestepDraw(self._times[places], np.ones(len(places), np.float32))


class LossSecondMomentSampler:
    """Draws timesteps in proportion to the root mean square of their last losses (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every timestep has been drawn `history` times. A share `uniform_share` of the probability
    stays uniform, so that every timestep is drawn sometimes.
    """

    needs_losses: ClassVar[bool] = True

    def __init__(self, num_timesteps: int, *, history: int = 10, uniform_share: float = 0.001) -> None:
        self.num_timesteps = num_timesteps
        self.history = history
        self.uniform_share = uniform_share
        self._losses = np.zeros((num_timesteps, history))  # a ring buffer per timestep
        self._counts = np.zeros(num_timesteps, dtype=np.int64)  # losses so far

    def weights(self) -> FloatArray:
        """Unnormalised probability of each timestep, [T]: ones until the history is full."""
        if np.any(self._counts < self.history):
            return np.ones(self.num_timesteps)
        root_mean_square = np.sqrt(np.mean(self._losses**2, axis=1))
        total = root_mean_square.sum()
        if total == 0.0:
            return np.ones(self.num_timesteps)
        return (1.0 - self.uniform_share) * root_mean_square / total + self.uniform_share / self.num_timesteps

    def draw(self, uniforms: ArrayLike) -> TimestepDraw:
        """Timesteps and weights for uniforms [B] in [0, 1), depending on the losses so far."""
        return draw_timesteps(self.weights(), uniforms)

    def update(self, timesteps: ArrayLike, losses: ArrayLike) -> None:
        """Add the unweighted losses [B] of the global batch, in its order, the same on every rank.

        Raises ValueError, with the state unchanged, for shapes that differ, a timestep outside the schedule,
        or a loss that is not finite, which would make the distribution invalid permanently.
        """
        t = np.asarray(timesteps, dtype=np.int64)
        values = np.asarray(losses, dtype=np.float64)
        if t.ndim != 1 or t.shape != values.shape:
            raise ValueError(
                f"timesteps {t.shape} and losses {values.shape} must both be [global batch]. Gather the "
                "losses of all ranks, in the order in which the timesteps were drawn."
            )
        if np.any((t < 0) | (t >= self.num_timesteps)):
            raise ValueError(
                f"timesteps are from {t.min()} to {t.max()}, but the sampler has 0 to "
                f"{self.num_timesteps - 1}. Pass the timesteps that draw() returned."
            )
        if not np.all(np.isfinite(values)):
            raise ValueError(
                f"{np.sum(~np.isfinite(values))} of {len(values)} losses are not finite. Do not pass such a step "
                "to update(), and check the learning rate and the precision."
            )
        order = np.argsort(t, kind="stable")  # a timestep may occur twice: its losses stay in their order
        same = t[order]
        earlier = np.arange(len(same)) - np.searchsorted(same, same)  # of the same timestep in this batch
        # Where a timestep occurs more often than it has places, numpy stores the last of several values.
        self._losses[same, (self._counts[same] + earlier) % self.history] = values[order]
        self._counts += np.bincount(t, minlength=self.num_timesteps)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """A copy of the state: losses float64 [T, H], counts int64 [T]."""
        return {"losses": self._losses.copy(), "counts": self._counts.copy()}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Load a state of `state_dict()`. Raises ValueError if names or shapes are not this sampler's."""
        expected = {name: value.shape for name, value in self.state_dict().items()}
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != expected:
            raise ValueError(
                f"the saved timestep sampler has arrays {shapes}, but this one has {expected}. Resume with the "
                "sampler, num_timesteps and history of the original run."
            )
        self._losses = np.array(state["losses"], dtype=np.float64)
        self._counts = np.array(state["counts"], dtype=np.int64)
