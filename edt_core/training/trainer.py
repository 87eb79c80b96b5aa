"""A running training, and its step: draw, forward and backward, exchange, check, update, record.

Legend: B global batch, n this rank's share of it.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.data.loader import LatentBatch, sample_names
from edt_core.data.streaming import LatentStream
from edt_core.data.subsets import share
from edt_core.diffusion import Schedule, objective_of
from edt_core.training.context import TrainContext
from edt_core.training.draws import StepDraws
from edt_core.training.history import named_losses
from edt_core.training.meter import Meter
from edt_core.training.optim import clip_gradients, gradient_norm, learning_rate
from edt_core.training.ranks import Ranks
from edt_core.training.state import TrainState
from edt_core.training.step import StepInputs, accumulate_gradient, sampled_latents


class Signal(IntEnum):
    """The signal that a rank sends to the others with the losses of each step; the largest one counts."""

    NOTHING = 0
    NEWS = 1  # there may be a request from outside the training
    TIME_IS_UP = 2


class NotFiniteError(FloatingPointError):
    """The loss or gradient of a step is not finite; the optimizer did not use it. `step` counts from 0."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class StepResult:
    """A backward pass's result on every rank: losses float64 [terms * passes, B], norm of the gradient, signal."""

    losses: NDArray[np.float64]
    norm: float
    signal: Signal


@dataclass(frozen=True)
class Timesteps:
    """Timesteps int64 [B] of the global batch, and the importance of each, float32 [B]."""

    steps: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass
class Trainer:
    """The fixed parts of a training, and its state."""

    config: TrainConfig
    dataset: LatentDataset | LatentStream
    context: TrainContext
    state: TrainState
    total_steps: int  # the length of the learning rate schedule
    last_step: int  # the step to stop at: less than total_steps if the time is up
    model: nn.Module  # the state's model, wrapped for the gradient exchange
    schedule: Schedule
    meter: Meter

    @property
    def ranks(self) -> Ranks:
        return self.context.ranks

    @property
    def share(self) -> slice:
        """This rank's places in the global batch."""
        return share(self.config.global_batch_size, self.ranks.rank, self.ranks.world_size)

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each rank."""
        world_size = self.ranks.world_size
        cuts = [share(self.config.global_batch_size, rank, world_size) for rank in range(world_size)]
        return [cut.stop - cut.start for cut in cuts]

    @property
    def time_is_up(self) -> bool:
        """Whether the training has used up its `max_hours`."""
        hours = self.config.max_hours
        return hours is not None and self.state.seconds >= hours * 3600

    def train_step(self, batch: LatentBatch, draws: StepDraws) -> Signal:
        """Do one optimizer step; return the largest signal of all ranks. Raises NotFiniteError on every rank."""
        inputs, timesteps = self._draw(batch, draws.to(self.ranks.device))
        self.state.optimizer.zero_grad(set_to_none=True)
        null_label = self.state.model.config.num_classes
        losses = accumulate_gradient(self.model, self.config, self.schedule, inputs, null_label)
        result = self._exchange(losses)
        self._check(batch, result)
        self._update(result.norm)
        self._record(result, timesteps)
        return result.signal

    def _draw(self, batch: LatentBatch, draws: StepDraws) -> tuple[StepInputs, Timesteps]:
        """The model's inputs on this rank, and the timesteps of the global batch."""
        device, mine = self.ranks.device, self.share
        timesteps = Timesteps(*self.state.timesteps.draw(draws.uniforms.numpy()))
        inputs = StepInputs(
            latents=sampled_latents(batch, draws.posterior_noise, self.dataset.scale),
            labels=batch.labels.to(device, non_blocking=True),
            timesteps=torch.from_numpy(timesteps.steps[mine]).to(device, non_blocking=True),
            weights=torch.from_numpy(timesteps.weights[mine]).to(device, non_blocking=True),
            draws=draws,
        )
        return inputs, timesteps

    def _exchange(self, losses: Tensor) -> StepResult:
        """Losses and signals of all ranks. Only here in a step does the host wait for the device."""
        signal = torch.full_like(losses[:1], float(self._signal()))
        rows = self.ranks.gather(torch.cat([losses, signal]), self.sizes)
        norm = gradient_norm(self.state.model.parameters())
        host = torch.cat([rows.flatten(), norm.reshape(1)]).cpu().double().numpy()
        gathered = host[:-1].reshape(len(rows), -1)
        return StepResult(gathered[:-1], float(host[-1]), Signal(int(gathered[-1].max())))

    def _signal(self) -> Signal:
        if self.ranks.rank == 0 and self.time_is_up:
            return Signal.TIME_IS_UP
        return Signal.NEWS if self.context.has_news() else Signal.NOTHING

    def _check(self, batch: LatentBatch, result: StepResult) -> None:
        """Raise NotFiniteError for losses or a gradient that are not finite."""
        bad: NDArray[np.bool_] = np.logical_not(np.isfinite(result.losses).all(axis=0))
        if bad.any():
            problem = f"the loss of step {batch.step} is not finite for {int(bad.sum())} of {bad.size} samples"
            rows = np.flatnonzero(bad[self.share])
        elif not math.isfinite(result.norm):
            problem = f"the gradient of step {batch.step} is not finite"
            rows = np.arange(len(batch.labels))
        else:
            return
        if len(rows):
            self.context.warn(f"{problem}: {sample_names(batch, rows)} of the latents, on rank {self.ranks.rank}")
        raise NotFiniteError(batch.step, problem)

    def _update(self, norm: float) -> None:
        """Update the weights and their averages."""
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.state.step, self.total_steps)
        if self.config.max_grad_norm is not None:
            clip_gradients(self.state.model.parameters(), norm, self.config.max_grad_norm)
        self.state.optimizer.step()
        self.state.ema.update()

    def _record(self, result: StepResult, timesteps: Timesteps) -> None:
        """Pass the losses to the timestep sampler, the history and the progress display."""
        state, names = self.state, objective_of(self.config.objective).terms
        terms = dict(zip(names, np.split(result.losses, len(names)), strict=True))
        state.timesteps.update(timesteps.steps, reduce(np.add, terms.values()).sum(axis=0))
        weights = timesteps.weights.astype(np.float64)
        named = named_losses(terms, timesteps.steps, weights, self.config.num_timesteps)
        state.history.add({**named, "grad_norm": result.norm})
        if self.ranks.rank == 0:
            self.context.store.check()
            self.context.step_done(state.step + 1, self.total_steps, named["loss"])
