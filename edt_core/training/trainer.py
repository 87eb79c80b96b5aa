"""A running training, and its step: draw, forward and backward, exchange, check, update, record.

Where the timesteps do not depend on the losses, check and record come one step late: the host then starts the next step
while the device still computes this one. Nothing that a step leaves (a row of the history, a checkpoint, a preview) is
written before the step is checked, and a rollback discards what an unchecked step did.

Legend: B global batch, n this rank's share of it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edt_core.data.batches import Latents
from edt_core.data.latents.tokens import TokenTable
from edt_core.data.loader import LatentBatch, sample_names
from edt_core.data.scale import LatentScale, model_scale
from edt_core.data.subsets import share
from edt_core.diffusion import Schedule, objective_of
from edt_core.models import DiffusionTransformer
from edt_core.training.align.alignment import Alignment, loss_terms
from edt_core.training.context import TrainContext
from edt_core.training.distill.teacher import Teacher
from edt_core.training.draws import StepDraws, to_device
from edt_core.training.history import QUARTILES, named_losses
from edt_core.training.meter import Meter
from edt_core.training.optim import clip_factor, clip_gradients, gradient_norm, learning_rate, set_rate
from edt_core.training.ranks import Ranks
from edt_core.training.speed.compiled import begin_step, failure, undo_compiled_parts
from edt_core.training.speed.update import CompiledUpdate
from edt_core.training.state import TrainState
from edt_core.training.step import StepInputs, accumulate_gradient, sampled_latents
from edt_core.training.validation.measure import HeldOutLoss

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

COMPILE_SECONDS = "compile_seconds"
_PASSES_OF_GRAPHS = 3  # to warm up, to record, to replay: what fails must fail before a step


class Signal(IntEnum):
    """The signal that a rank sends to the others with the losses of each step; the largest one counts."""

    NOTHING = 0
    NEWS = 1  # there may be a request from outside the training
    TIME_IS_UP = 2


class NotFiniteError(FloatingPointError):
    """The loss or gradient of a step is not finite; the training must go back. `step` counts from 0."""

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
    """Times [B] of the global batch in the objective's form, and the importance of each, float32 [B]."""

    steps: NDArray[Any]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Launched:
    """A step whose result may still be on its way: `numbers` are losses and signals [rows, B], flat, and the norm.

    `batch` is without its latents. `arrived` is None for numbers that are on the host already. `finite`: whether the
    numbers are, bool [] on the device, for a masked update.
    """

    batch: LatentBatch
    timesteps: Timesteps
    numbers: Tensor
    rows: int
    arrived: torch.cuda.Event | None
    finite: Tensor | None = None

    def result(self) -> StepResult:
        """Wait for the numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()
        host = self.numbers.double().numpy()
        gathered = host[:-1].reshape(self.rows, -1)
        return StepResult(gathered[:-1], float(host[-1]), Signal(int(gathered[-1].max())))


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is valid; None if it is already."""
    if not numbers.is_cuda:
        return numbers.cpu(), None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


@dataclass
class Trainer:
    """The fixed parts of a training, and its state; `unchecked` is the last step if its result was not read yet."""

    config: TrainConfig
    dataset: Latents
    context: TrainContext
    state: TrainState
    total_steps: int  # the length of the learning rate schedule
    last_step: int  # the step to stop at: less than total_steps if the time is up
    model: nn.Module  # the state's network, wrapped for the gradient exchange
    schedule: Schedule | None
    meter: Meter
    alignment: Alignment | None = None
    teacher: Teacher | None = None
    tokens: TokenTable | None = None  # what `train.align: features` aligns with
    validation: HeldOutLoss | None = None
    unchecked: Launched | None = None
    untried: bool = False  # the model's parts will be compiled by their first call, at the next step
    compiled_update: CompiledUpdate | None = None
    graphs: bool = False  # the model's parts are CUDA graphs

    @property
    def frozen(self) -> list[DiffusionTransformer]:
        """The models that compute targets."""
        aligned = [] if self.alignment is None else self.alignment.networks
        return aligned if self.teacher is None else [*aligned, self.teacher.model]

    @property
    def masked(self) -> bool:
        """Whether the update leaves a step out by itself if its numbers are not finite."""
        return self.compiled_update is not None and self.compiled_update.masked

    @property
    def scale(self) -> LatentScale:
        """The scale of the model's latents."""
        return model_scale(self.state.model.config, self.dataset.scale)

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
    def micro_batches(self) -> int | None:
        """The number of micro-batches of every rank, if they exchange after each; None if each rank has its own."""
        return None if self.state.rows is None else -(-max(self.sizes) // self.config.micro_batch())

    @property
    def time_is_up(self) -> bool:
        """Whether the training has used up its `max_hours`."""
        hours = self.config.max_hours
        return hours is not None and self.state.seconds >= hours * 3600

    def train_step(self, batch: LatentBatch, draws: StepDraws) -> Signal:
        """Do one optimizer step; return the largest signal of all ranks. Raises NotFiniteError on every rank.

        If the timesteps do not depend on the losses, check, history and signal are those of the step before.
        """
        inputs, timesteps = self._draw(batch, draws.to(self.ranks.device))
        if self.untried:
            self._try_compiled(inputs)
        self.state.zero_grad()
        if self.graphs:
            begin_step()
        losses = self._accumulate(self.model, inputs)
        norm = self.state.norm(gradient_norm)
        launched = self._exchange(batch, timesteps, losses, norm)
        needs_losses = self.state.timesteps.needs_losses
        if self.masked or not needs_losses:  # the device continues while the host waits
            self._update(norm, launched.finite)
        if not needs_losses:
            signal = self.settle()
            self.unchecked = launched
            return signal
        result = self._checked(launched)
        if not self.masked:
            self._update(norm)
        self._record(result, launched)
        return result.signal

    def settle(self) -> Signal:
        """Check and record the last step, if that is still to be done; return its signal. Raises NotFiniteError."""
        launched, self.unchecked = self.unchecked, None
        if launched is None:
            return Signal.NOTHING
        result = self._checked(launched)
        self._record(result, launched)
        return result.signal

    def _try_compiled(self, inputs: StepInputs) -> None:
        """Compile the model's parts with a pass that is thrown away; without them if that fails on any rank.

        It is one without an exchange of gradients, of which half could not be repeated. The step itself comes next,
        compiled or not, with the same inputs.
        """
        self.untried, context, state, started = False, self.context, self.state, time.perf_counter()

        def run() -> None:
            for _ in range(_PASSES_OF_GRAPHS if self.graphs else 1):
                self.state.zero_grad()
                if self.graphs:
                    begin_step()
                self._accumulate(state.network, inputs)
            if self.compiled_update is not None:
                self.compiled_update.rehearse()

        problem = failure(run, self.ranks, stop=self.micro_batches is not None)
        self.state.zero_grad()
        if problem is not None:
            for network in (state.model, *self.frozen):
                undo_compiled_parts(network)
            self.compiled_update, self.graphs = None, False
        if self.ranks.rank != 0:
            return
        if problem is None:
            context.report({COMPILE_SECONDS: time.perf_counter() - started}, self.state.step)
        else:
            context.warn(
                f"the model could not be compiled ({problem}); training continues without torch.compile, with slower "
                "steps and, but for the last bits, the same result. Mend the compiler (a GPU needs triton and a C "
                "compiler), or set train.compile=false"
            )

    def _accumulate(self, model: nn.Module, inputs: StepInputs) -> Tensor:
        """The losses of a forward and backward pass of `model`, the state's network as it is or wrapped."""
        config, null_label = self.config, self.state.model.config.num_classes
        losses = accumulate_gradient(
            model, config, self.schedule, inputs, null_label, self.alignment, self.teacher, self.micro_batches
        )
        if self.state.rows is not None:
            self.state.rows.take_gradients()
        return losses

    def _draw(self, batch: LatentBatch, draws: StepDraws) -> tuple[StepInputs, Timesteps]:
        """The model's inputs on this rank, and the timesteps of the global batch."""
        device, mine = self.ranks.device, self.share
        timesteps = Timesteps(*self.state.timesteps.draw(draws.uniforms.numpy()))
        inputs = StepInputs(
            latents=sampled_latents(batch, draws.posterior_noise, self.scale),
            labels=to_device(batch.labels, device),
            timesteps=to_device(torch.from_numpy(timesteps.steps[mine]), device),
            weights=to_device(torch.from_numpy(timesteps.weights[mine]), device),
            draws=draws,
            tokens=None if batch.tokens is None else to_device(batch.tokens, device),
        )
        return inputs, timesteps

    def _exchange(self, batch: LatentBatch, timesteps: Timesteps, losses: Tensor, norm: Tensor) -> Launched:
        """Losses and signals of all ranks, on their way to the host, which does not wait for them here."""
        signal = torch.full_like(losses[:1], float(self._signal()))
        rows = self.ranks.gather(torch.cat([losses, signal]), self.sizes)
        numbers = torch.cat([rows.flatten(), norm.reshape(1)])
        finite = numbers.isfinite().all() if self.masked else None
        on_host, arrived = _to_host(numbers)
        without_latents = replace(batch, posterior=batch.posterior.new_empty(0), tokens=None)
        return Launched(without_latents, timesteps, on_host, len(rows), arrived, finite)

    def _signal(self) -> Signal:
        if self.ranks.rank == 0 and self.time_is_up:
            return Signal.TIME_IS_UP
        return Signal.NEWS if self.context.has_news() else Signal.NOTHING

    def _checked(self, launched: Launched) -> StepResult:
        """A step's result. Raises NotFiniteError for losses or a gradient that are not finite."""
        batch, result = launched.batch, launched.result()
        bad: NDArray[np.bool_] = np.logical_not(np.isfinite(result.losses).all(axis=0))
        if bad.any():
            problem = f"the loss of step {batch.step} is not finite for {int(bad.sum())} of {bad.size} samples"
            rows = np.flatnonzero(bad[self.share])
        elif not math.isfinite(result.norm):
            problem = f"the gradient of step {batch.step} is not finite"
            rows = np.arange(len(batch.labels))
        else:
            return result
        if len(rows):
            self.context.warn(f"{problem}: {sample_names(batch, rows)} of the latents, on rank {self.ranks.rank}")
        raise NotFiniteError(batch.step, problem)

    def _update(self, norm: Tensor, wanted: Tensor | None = None) -> None:
        """Update the weights and their averages. The norm is that of the gradient, on its device.

        `wanted`: whether to, for a masked update. The first step, which the library does, is not masked: if it is not
        finite, going back undoes it.
        """
        set_rate(self.state.optimizer, learning_rate(self.config, self.state.step, self.total_steps))
        max_norm = self.config.max_grad_norm
        if self.compiled_update is not None:
            clip = None if max_norm is None else clip_factor(norm, max_norm)
            if self.compiled_update(clip, wanted, self.state.step + 1):
                self.state.exchange()
                return
        if max_norm is not None:
            clip_gradients(self.state.parameters(), norm, max_norm)
        self.state.optimizer.step()
        self.state.exchange()
        self.state.ema.update(step=self.state.step + 1)

    def _record(self, result: StepResult, launched: Launched) -> None:
        """Pass the losses to the timestep sampler, the history and the progress display."""
        state, timesteps, objective = self.state, launched.timesteps, objective_of(self.config.objective)
        names = loss_terms(self.config)
        terms = dict(zip(names, np.split(result.losses, len(names)), strict=True))
        state.timesteps.update(timesteps.steps, reduce(np.add, terms.values()).sum(axis=0))
        weights = timesteps.weights.astype(np.float64)
        named = named_losses(terms, objective.parts(timesteps.steps, QUARTILES, self.config.num_timesteps), weights)
        state.history.add({**named, "grad_norm": result.norm})
        if self.ranks.rank == 0:
            self.context.store.check()
            self.context.step_done(launched.batch.step + 1, self.total_steps, named["loss"])
