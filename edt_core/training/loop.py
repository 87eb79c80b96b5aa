"""The training of an EDT: one function over a small context.

Legend: N this rank's share of the global batch B, C latent channels, h latent height and width.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.data.loader import BatchPlan, LatentBatch, latent_batches
from edt_core.data.prefetch import prefetched
from edt_core.data.streaming import LatentStream, stream_latents
from edt_core.diffusion import (
    LossSecondMomentSampler,
    Schedule,
    TimestepSampler,
    UniformSampler,
    linear_schedule,
    q_sample,
    training_losses,
)
from edt_core.models import EDT, ModelConfig
from edt_core.training.checkpoint import Checkpoint, load_checkpoint
from edt_core.training.context import TrainContext
from edt_core.training.draws import StepDraws, draw_step
from edt_core.training.ema import EMA
from edt_core.training.optim import flatten_state, learning_rate, make_optimizer, restore_state

_STEPS_AHEAD = 2


@dataclass
class TrainState:
    """Everything that changes while training.

    `step` steps are done; `history` is one row every `log_every` steps, `pending` the losses of the steps since.
    """

    model: EDT
    ema: EMA
    optimizer: torch.optim.Optimizer
    timesteps: TimestepSampler
    step: int
    history: list[dict[str, float]]
    pending: list[dict[str, float]]


def initial_model(config: ModelConfig, seed: int) -> EDT:
    """A fresh EDT whose weights are a function of the seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EDT(config)


def initial_state(config: TrainConfig, model_config: ModelConfig, device: torch.device | str = "cpu") -> TrainState:
    """The state before the first step."""
    model = initial_model(model_config, config.seed).to(device).train()
    sampler = LossSecondMomentSampler if config.timestep_sampler == "loss-second-moment" else UniformSampler
    return TrainState(
        model=model,
        ema=EMA(model, config.ema_decay),
        optimizer=make_optimizer(config, (p for p in model.parameters() if p.requires_grad)),
        timesteps=sampler(config.num_timesteps),
        step=0,
        history=[],
        pending=[],
    )


def to_checkpoint(state: TrainState) -> Checkpoint:
    """What of the state a resumed training needs."""
    tensors, groups = flatten_state(state.optimizer)
    return Checkpoint(
        step=state.step,
        model=state.model.state_dict(),
        ema=state.ema.state_dict(),
        optimizer=tensors,
        optimizer_groups=groups,
        timesteps={name: torch.from_numpy(value) for name, value in state.timesteps.state_dict().items()},
        model_config=state.model.config.to_dict(),
        history=state.history,
        pending=state.pending,
    )


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's values into a state of the same configuration."""
    state.model.load_state_dict(checkpoint.model)
    state.ema.load_state_dict(checkpoint.ema)
    restore_state(state.optimizer, checkpoint.optimizer, checkpoint.optimizer_groups)
    state.timesteps.load_state_dict({name: value.numpy() for name, value in checkpoint.timesteps.items()})
    state.step, state.history, state.pending = checkpoint.step, list(checkpoint.history), list(checkpoint.pending)


def prepared_steps(
    config: TrainConfig,
    model_config: ModelConfig,
    dataset: LatentDataset | LatentStream,
    context: TrainContext,
    start_step: int,
) -> Iterator[tuple[LatentBatch, StepDraws]]:
    """This rank's batch and draws of each step from `start_step` to the last, still on the host."""
    rank, world_size, device = context.rank, context.world_size, context.device
    plan = BatchPlan(config.seed, config.global_batch_size, config.mirror_prob, rank, world_size, device)
    if isinstance(dataset, LatentStream):
        batches = stream_latents(dataset, plan, start_step)
    else:
        batches = latent_batches(dataset, plan, start_step)
    with closing(batches):
        for batch in islice(batches, max(config.max_steps - start_step, 0)):
            yield batch, draw_step(config, batch.step, model_config).slice(rank, world_size).pinned(device)


def sampled_latents(batch: LatentBatch, noise: Tensor, scaling_factor: float) -> Tensor:
    """Scaled latents float32 [N, C, h, h] on the device of `noise` [N, C, h, h]: a draw of each row's posterior."""
    mean, std = batch.posterior.to(noise.device, non_blocking=True).unbind(1)
    return (mean + std * noise) * scaling_factor


def step_losses(
    model: nn.Module, config: TrainConfig, schedule: Schedule, draws: StepDraws, batch: tuple[Tensor, ...]
) -> Tensor:
    """Unweighted losses [1 or 2, N] of the full and, if it is on, the masked pass for (latents, labels, t, null label).

    Both passes go through the model as one batch, the full one with masks that keep everything: one call, one gradient
    exchange. Each has its own noise and label dropout, and they share their timesteps.
    """
    latents, labels, t, null = batch
    passes = 2 if config.masked_loss else 1
    y = torch.where(draws.drop_label[:passes], null, labels).flatten()
    x_start, t = latents.repeat(passes, 1, 1, 1), t.repeat(passes)
    noise = draws.noise[:passes].flatten(0, 1)
    x_t = q_sample(schedule, x_start, t, noise)
    masks = [torch.cat([torch.ones_like(mask), mask]) for mask in draws.masks] if config.masked_loss else None
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        output = model(x_t, t, y, masks)
    losses = training_losses(schedule, output.float(), x_start, x_t, noise, t, min_snr_gamma=config.min_snr_gamma)
    return losses.loss.view(passes, -1)


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    dataset: LatentDataset | LatentStream,
    context: TrainContext,
    resume_from: Path | None = None,
) -> TrainState:
    """Train to `max_steps`, from the start or from a checkpoint folder, and report checkpoints on the way.

    A thread reads and draws _STEPS_AHEAD steps ahead: the accelerator does not wait for either.

    The step is full loss plus masked loss (arXiv 2410.23788, section 3.3), each sample weighted by its timestep's
    importance. Raises FloatingPointError, before the optimizer sees it, where a loss is not finite.
    """
    state = initial_state(config, model_config, context.device)
    if resume_from is not None:
        restore(state, load_checkpoint(resume_from))
    model = context.wrap(state.model)
    schedule = linear_schedule(config.num_timesteps)
    steps = prefetched(prepared_steps(config, model_config, dataset, context, state.step), _STEPS_AHEAD)
    row_step, row_time = state.step, time.perf_counter()
    with closing(steps):
        for batch, drawn in steps:
            draws = drawn.to(context.device)
            latents = sampled_latents(batch, draws.posterior_noise, dataset.scaling_factor)
            state.pending.append(_one_step(config, state, model, schedule, context, (batch, latents, draws)))
            state.step += 1
            if state.step % config.log_every == 0 or state.step == config.max_steps:
                state.history.append(_history_row(config, state))
                state.pending.clear()
                images = (state.step - row_step) * config.global_batch_size
                rate = images / max(time.perf_counter() - row_time, 1e-9)
                row_step, row_time = state.step, time.perf_counter()
                if context.rank == 0:
                    context.log({**state.history[-1], "images_per_s": rate}, state.step)
            if state.step % config.checkpoint_every == 0 or state.step == config.max_steps:
                checkpoint = to_checkpoint(state) if context.rank == 0 else None
                latest = state.history[-1] if state.history else {}
                context.report({**latest, "step": state.step}, checkpoint)
    return state


def _one_step(
    config: TrainConfig,
    state: TrainState,
    model: nn.Module,
    schedule: Schedule,
    context: TrainContext,
    inputs: tuple[LatentBatch, Tensor, StepDraws],
) -> dict[str, float]:
    """One optimizer step on (batch, its latents on the device, draws); the weighted losses of the global batch."""
    batch, latents, draws = inputs
    timesteps, weights = state.timesteps.draw(draws.uniforms.numpy())
    share = len(timesteps) // context.world_size
    mine = slice(context.rank * share, (context.rank + 1) * share)
    labels = batch.labels.to(context.device, non_blocking=True)
    t = torch.from_numpy(timesteps[mine]).to(context.device)
    null = torch.tensor(state.model.config.num_classes, device=context.device)

    losses = step_losses(model, config, schedule, draws, (latents, labels, t, null))
    local_weights = torch.from_numpy(weights[mine]).to(context.device)
    everyones = context.gather(losses.detach()).numpy()
    _require_finite(everyones, batch, mine)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.zero_grad(set_to_none=True)
    (losses * local_weights).mean(dim=1).sum().backward()
    state.optimizer.step()
    state.ema.update(state.model)
    state.timesteps.update(timesteps, everyones.sum(axis=0, dtype=np.float64))
    return _weighted(everyones, weights)


def _weighted(losses: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    means = (losses.astype(np.float64) * weights).mean(axis=1)
    named = dict(zip(("loss_full", "loss_masked"), means.tolist(), strict=False))
    return {"loss": float(means.sum()), **named}


def _require_finite(losses: np.ndarray, batch: LatentBatch, mine: slice) -> None:
    """Raises FloatingPointError on every rank where any rank's loss is not finite; each names its own samples."""
    bad = ~np.isfinite(losses).all(axis=0)
    if bad.any():
        places = np.flatnonzero(bad[mine])[:10]
        names = f"keys {[batch.keys[i] for i in places]}" if batch.keys else f"rows {batch.indices[places].tolist()}"
        raise FloatingPointError(
            f"the loss of step {batch.step} is not finite for {int(bad.sum())} of {bad.size} samples ({names} of the "
            "latents on this worker); lower lr, or train in fp32"
        )


def _history_row(config: TrainConfig, state: TrainState) -> dict[str, float]:
    """Mean losses of the steps since the last row. No clock in it: equal trainings have equal histories."""
    names = state.pending[0].keys()
    means = {name: sum(losses[name] for losses in state.pending) / len(state.pending) for name in names}
    rate = learning_rate(config, state.step - 1)
    return {**means, "step": state.step, "lr": rate, "grad_norm": _grad_norm(state.model)}


def _grad_norm(model: nn.Module) -> float:
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(torch.linalg.vector_norm(torch.stack(norms)))
