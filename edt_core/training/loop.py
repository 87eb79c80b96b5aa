"""The training of an EDT: one function over a small context.

Legend: B global batch, n this rank's share of it.
"""

import math
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import reduce
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.data.loader import BatchPlan, LatentBatch, latent_batches, require_finite, sample_names
from edt_core.data.order import share
from edt_core.data.prefetch import prefetched
from edt_core.data.streaming import LatentStream, stream_latents
from edt_core.diffusion import Schedule, objective_of
from edt_core.errors import Stopped
from edt_core.models import ModelConfig, training_flops
from edt_core.precision import use_precision
from edt_core.training.context import Request, TrainContext, latest
from edt_core.training.draws import StepDraws, draw_step
from edt_core.training.history import named_losses
from edt_core.training.meter import Meter, matmul_rate
from edt_core.training.optim import clip_gradients, gradient_norm, learning_rate
from edt_core.training.ranks import Ranks
from edt_core.training.state import TrainState, initial_state, restart, restore, to_checkpoint
from edt_core.training.step import StepInputs, accumulate_gradient, sampled_latents

_STEPS_AHEAD = 2
_NEWS, _TIME_IS_UP = 1.0, 2.0  # flags that travel with each step's losses


class NotFiniteError(FloatingPointError):
    """A step whose loss or gradient is not finite; it has not reached the optimizer. `step` counts from 0."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


@dataclass
class Training:
    """What stays the same through a training, and the state that does not."""

    config: TrainConfig
    dataset: LatentDataset | LatentStream
    context: TrainContext
    state: TrainState
    total_steps: int  # that the learning rate's fall is laid out for
    last_step: int  # where to end: before, if the time is up
    model: nn.Module  # the state's model as this world trains it
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


def train(
    config: TrainConfig, model_config: ModelConfig, dataset: LatentDataset | LatentStream, context: TrainContext
) -> TrainState:
    """Train to the last step, from the newest checkpoint that the context has, and save checkpoints on the way.

    The step is full loss plus masked loss (arXiv 2410.23788, section 3.3), each sample weighted by its timestep's
    importance. A step whose loss or gradient is not finite never reaches the optimizer: the training goes back to its
    newest checkpoint and leaves that step out.

    Raises NotFiniteError where that was in vain `max_rollbacks` times, Stopped when it was asked to stop and has
    written a checkpoint, and UserError for latents that are not finite and for a checkpoint of another training.
    """
    training = _begin(config, model_config, dataset, context)
    try:
        _run_to_the_end(training)
    except BaseException:
        if context.ranks.rank == 0:
            with suppress(Exception):  # the error that came first is the one to tell
                context.store.flush()
        raise
    if context.ranks.rank == 0:
        context.store.flush()
    return training.state


def _run_to_the_end(training: Training) -> None:
    while True:
        try:
            return _run(training)
        except NotFiniteError as trouble:
            _roll_back(training, trouble)


def _begin(
    config: TrainConfig, model_config: ModelConfig, dataset: LatentDataset | LatentStream, context: TrainContext
) -> Training:
    use_precision(config.precision)
    ranks = context.ranks
    state = initial_state(config, model_config, ranks.device)
    if (checkpoint := latest(context)) is not None:
        restore(state, checkpoint, config, len(dataset))
    total_steps = config.total_steps(len(dataset))
    # A checkpoint out of turn is no end, even if the time was up with its step: one more step ends in a regular one.
    ended = checkpoint is not None and checkpoint.regular and _time_is_up(config, state)
    state.model.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        state.model.compile(dynamic=False)
    flops, peak = 0, 1.0  # of the other ranks, whose rates nobody is told
    if ranks.rank == 0:
        flops = training_flops(model_config, masked=config.masked_loss)
        peak = matmul_rate(ranks.device, config.precision) * ranks.world_size
    return Training(
        config,
        dataset,
        context,
        state,
        total_steps=total_steps,
        last_step=state.step if ended else total_steps,
        model=ranks.wrap(state.model),
        schedule=objective_of(config.objective).schedule(config.num_timesteps),
        meter=Meter(config.global_batch_size, ranks.device, flops, peak),
    )


def prepared_steps(training: Training) -> Iterator[tuple[LatentBatch, StepDraws]]:
    """This rank's batch and draws of each step from the state's to the last, still on the host.

    Raises UserError for latents that are not finite.
    """
    config, dataset, ranks = training.config, training.dataset, training.ranks
    first, last = training.state.step, training.last_step
    device = ranks.device
    plan = BatchPlan(config.seed, config.global_batch_size, config.mirror_prob, ranks.rank, ranks.world_size, device)
    if isinstance(dataset, LatentStream):
        read = stream_latents(dataset, plan, first)
    else:
        read = latent_batches(dataset, plan, first)
    with closing(read) as batches:
        for batch in islice(batches, max(last - first, 0)):
            require_finite(batch)
            draws = draw_step(config, batch.step, training.state.model.config)
            yield batch, draws.rows(training.share).pinned(device)


def _run(training: Training) -> None:
    """Train from the state's step to the last. A thread reads and draws steps ahead: no accelerator waits for them."""
    state, context, meter = training.state, training.context, training.meter
    steps = prefetched(prepared_steps(training), _STEPS_AHEAD)
    meter.begin()
    with closing(steps):
        while state.step < training.last_step:
            with meter.waiting():
                batch, draws = next(steps)
            flag = 0.0
            if batch.step not in state.skipped:
                flag = _step(training, batch, draws)
            state.step += 1
            _count_time(training)
            if flag >= _TIME_IS_UP:
                training.last_step = state.step
            _tell(training)
            if flag == _NEWS and (request := context.look()) is not Request.NOTHING:
                _answer(training, request)


def _step(training: Training, batch: LatentBatch, drawn: StepDraws) -> float:
    """One optimizer step; returns the highest flag of all ranks. Raises NotFiniteError, the same on every rank."""
    config, state, device = training.config, training.state, training.ranks.device
    draws = drawn.to(device)
    timesteps, weights = state.timesteps.draw(draws.uniforms.numpy())
    mine = training.share
    inputs = StepInputs(
        latents=sampled_latents(batch, draws.posterior_noise, training.dataset.scale),
        labels=batch.labels.to(device, non_blocking=True),
        timesteps=torch.from_numpy(timesteps[mine]).to(device, non_blocking=True),
        weights=torch.from_numpy(weights[mine]).to(device, non_blocking=True),
        draws=draws,
    )
    state.optimizer.zero_grad(set_to_none=True)
    losses = accumulate_gradient(training.model, config, training.schedule, inputs, state.model.config.num_classes)
    everyones, flag, norm = _exchanged(training, losses)
    _require_finite(training, batch, everyones, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step, training.total_steps)
    if config.max_grad_norm is not None:
        clip_gradients(state.model.parameters(), norm, config.max_grad_norm)
    state.optimizer.step()
    state.ema.update()
    names = objective_of(config.objective).terms
    terms = dict(zip(names, np.split(everyones, len(names)), strict=True))
    state.timesteps.update(timesteps, reduce(np.add, terms.values()).sum(axis=0))
    named = named_losses(terms, timesteps, weights.astype(np.float64), config.num_timesteps)
    state.history.add({**named, "grad_norm": norm})
    if training.ranks.rank == 0:
        training.context.store.check()
        training.context.step_done(state.step + 1, training.total_steps, named["loss"])
    return flag


def _exchanged(training: Training, losses: Tensor) -> tuple[np.ndarray, float, float]:
    """Losses float64 [terms * passes, B] of the global batch, the highest flag, and the norm of the gradient.

    The one place in a step where the host waits for the device.
    """
    flag = torch.full_like(losses[:1], _flag(training))
    rows = training.ranks.gather(torch.cat([losses, flag]), training.sizes)
    norm = gradient_norm(training.state.model.parameters())
    host = torch.cat([rows.flatten(), norm.reshape(1)]).cpu().double().numpy()
    everyones = host[:-1].reshape(len(rows), -1)
    return everyones[:-1], float(everyones[-1].max()), float(host[-1])


def _flag(training: Training) -> float:
    if training.ranks.rank == 0 and _time_is_up(training.config, training.state):
        return _TIME_IS_UP
    return _NEWS if training.context.has_news() else 0.0


def _time_is_up(config: TrainConfig, state: TrainState) -> bool:
    return config.max_hours is not None and state.seconds >= config.max_hours * 3600


def _count_time(training: Training) -> None:
    seconds = training.meter.step_done()
    if training.config.max_hours is not None:  # else equal trainings would have unequal checkpoints
        training.state.seconds += seconds


def _require_finite(training: Training, batch: LatentBatch, losses: np.ndarray, norm: float) -> None:
    bad = ~np.isfinite(losses).all(axis=0)
    if bad.any():
        what = f"the loss of step {batch.step} is not finite for {int(bad.sum())} of {bad.size} samples"
        here = np.flatnonzero(bad[training.share])
    elif not math.isfinite(norm):
        what = f"the gradient of step {batch.step} is not finite"
        here = np.arange(len(batch.labels))
    else:
        return
    if len(here):
        training.context.warn(f"{what}: {sample_names(batch, here)} of the latents, on rank {training.ranks.rank}")
    raise NotFiniteError(batch.step, what)


def _roll_back(training: Training, trouble: NotFiniteError) -> None:
    """Go back to the newest checkpoint, or to the start, and leave the step out. Raises it when that is enough."""
    config, state, context = training.config, training.state, training.context
    rollbacks, skipped, seconds = state.rollbacks + 1, state.skipped | {trouble.step}, state.seconds
    if rollbacks > config.max_rollbacks:
        raise NotFiniteError(
            trouble.step,
            f"{trouble}; max_rollbacks is {config.max_rollbacks}, and this would be one more: lower lr, set "
            "max_grad_norm, or train in fp32",
        ) from trouble
    if (checkpoint := latest(context)) is None:
        restart(state, config)
    else:
        restore(state, checkpoint, config, len(training.dataset))
    state.rollbacks, state.skipped, state.seconds = rollbacks, skipped, seconds
    if context.ranks.rank == 0:
        context.warn(
            f"{trouble}; rolled back to step {state.step}, continuing without step {trouble.step} "
            f"(rollback {rollbacks} of at most {config.max_rollbacks})"
        )
        context.report({"rollbacks": float(rollbacks)}, trouble.step)


def _tell(training: Training) -> None:
    """The history's row, figures, checkpoint and preview that are due after a step."""
    config, state, context = training.config, training.state, training.context
    at_end = state.step == training.last_step
    if (state.step % config.log_every == 0 or at_end) and state.history.pending:
        row = state.history.close_row(state.step, learning_rate(config, state.step - 1, training.total_steps))
        if context.ranks.rank == 0:
            context.report({**row, **training.meter.row()}, state.step)
    if state.step % config.checkpoint_every == 0 or at_end:
        _save(training, regular=True)
    every = config.preview_every
    if every is not None and context.ranks.rank == 0 and (state.step % every == 0 or at_end):
        context.preview(state.ema.averages[0], state.step)


def _save(training: Training, *, regular: bool) -> None:
    if training.ranks.rank == 0:
        checkpoint = to_checkpoint(training.state, training.config, len(training.dataset), regular=regular)
        training.context.store.save(checkpoint)


def _answer(training: Training, request: Request) -> None:
    """Write a checkpoint out of turn. Raises Stopped where that was to be the last thing."""
    step, context = training.state.step, training.context
    if step == training.last_step:
        return
    if step % training.config.checkpoint_every:
        _save(training, regular=False)
    if context.ranks.rank == 0:
        context.store.flush()
    if request is Request.STOP:
        context.ranks.wait()  # what the other ranks say of the checkpoint is true as well
        raise Stopped(f"stopped at step {step} of {training.total_steps}, a checkpoint is written")
