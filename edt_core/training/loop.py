"""The training of a diffusion transformer: one function over a small context.

Legend: B global batch, n this rank's share of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from edt_core.data.batches import Latents, batches_of, without
from edt_core.data.holdout import Holdout
from edt_core.data.latents.tokens import TokenTable
from edt_core.data.loader import BatchPlan, LatentBatch, require_finite
from edt_core.data.prefetch import prefetched
from edt_core.data.streaming import TarStream
from edt_core.diffusion import objective_of
from edt_core.errors import Stopped
from edt_core.models import ModelConfig
from edt_core.precision import use_precision
from edt_core.store.layout import MODEL_WEIGHTS
from edt_core.training.align.alignment import Alignment, alignment_of
from edt_core.training.align.settings import align_settings
from edt_core.training.checkpoint import Checkpoint
from edt_core.training.context import Request, TrainContext, latest
from edt_core.training.distill.teacher import Teacher, teacher_of
from edt_core.training.draws import StepDraws, draw_step
from edt_core.training.meter import Meter, datasheet_rate, matmul_rate
from edt_core.training.optim import decay_start, learning_rate
from edt_core.training.posthoc.snapshots import snapshot_steps
from edt_core.training.shard.files import JointFiles
from edt_core.training.speed.arithmetic import set_arithmetic
from edt_core.training.speed.compiled import compile_parts, is_compiled, wants_graphs
from edt_core.training.speed.update import CompiledUpdate
from edt_core.training.start.trainable import step_flops
from edt_core.training.state import TrainState, initial_state, restart, restore, to_checkpoint
from edt_core.training.trainer import NotFiniteError, Signal, Trainer
from edt_core.training.validation.measure import HeldOutLoss
from edt_core.training.validation.overfitting import HELD_OUT_LOSS

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_STEPS_AHEAD = 2
ReadInitial = Callable[[], Checkpoint]


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    dataset: Latents,
    context: TrainContext,
    initial: ReadInitial | None = None,
    holdout: Holdout | None = None,
    tokens: TokenTable | None = None,
) -> TrainState:
    """Train to the last step, resuming from the context's newest checkpoint, and save checkpoints on the way.

    Without a checkpoint it starts from what `initial` reads, a checkpoint of step 0 (see
    `edt_core.training.start.initial`), or from random weights if `initial` is None. With `train.distill` that
    checkpoint is also the teacher, and `initial` is read again when a training resumes.

    The rows of `holdout` are not trained on. Every `validate_every` steps and at the end, the
    loss of the averaged weights on some of them is measured, and again for the score of each regular checkpoint.
    `tokens` of all rows are needed for `train.align: features`, unless they come with a stream.

    The loss is full loss plus masked loss (arXiv 2410.23788, section 3.3), each sample weighted by its timestep's
    importance. After a step whose loss or gradient is not finite, the training rolls back to its newest checkpoint and
    skips that step: no checkpoint, preview or row of the history contains it.

    Raises NotFiniteError after more than `max_rollbacks` rollbacks, Stopped after a stop request, once a checkpoint is
    written, and UserError for latents that are not finite and for a checkpoint of another training.
    """
    validation = None
    if holdout is not None:
        assert not isinstance(dataset, TarStream), "tars have no rows"
        if config.distill is None and config.prune is None:  # a student has no loss on data, nor has a gated model
            validation = HeldOutLoss(config, model_config, dataset, holdout, context.ranks)
        dataset = without(dataset, holdout.rows)
    trainer = _begin(config, model_config, dataset, context, initial)
    trainer.validation, trainer.tokens = validation, tokens
    try:
        _run_to_the_end(trainer, initial)
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            context.store.flush()
        raise
    context.store.flush()
    if context.store.joint is not None:
        context.store.joint.close()
        context.store.joint = None
    return trainer.state


def _run_to_the_end(trainer: Trainer, initial: ReadInitial | None) -> None:
    while True:
        try:
            return _run(trainer)
        except NotFiniteError as error:
            _roll_back(trainer, error, initial)


def _begin(
    config: TrainConfig,
    model_config: ModelConfig,
    dataset: Latents,
    context: TrainContext,
    initial: ReadInitial | None,
) -> Trainer:
    use_precision(config.precision)
    ranks = context.ranks
    state = initial_state(config, model_config, ranks.device, ranks)
    checkpoint = latest(context)
    begins = checkpoint is None or state.trained is not None  # else the checkpoint has all weights
    start = initial() if initial is not None and (begins or config.distill is not None) else None
    if start is not None and begins:
        restart(state, config, start)
    if checkpoint is not None:
        restore(state, checkpoint, config, len(dataset))
    total_steps = config.total_steps(len(dataset))
    if ranks.rank == 0:
        context.store.report_missing(snapshot_steps(config, total_steps), config.ema_widths, state.step)
    context.store.stable_step, context.store.keep_every = decay_start(config, total_steps), config.keep_every
    if state.shards is not None:
        context.store.joint = JointFiles(ranks, config.timeout_s, None if state.rows is None else state.rows.rows_of)
    state.model.activation_checkpointing = config.activation_checkpointing
    set_arithmetic(state.model, config)
    graphs = wants_graphs(config) and ranks.device.type == "cuda"
    compiled = is_compiled(config, ranks.device)
    alignment = alignment_of(config, align_settings(config, model_config), state, ranks.device)
    weights = None if start is None else start.tensors[MODEL_WEIGHTS]
    teacher = teacher_of(config, model_config, weights, ranks.device)
    update = _compiled(config, state, alignment, teacher, context, graphs) if compiled else None
    flops, peak, sheet = 0, 1.0, None  # placeholders: only rank 0 reports rates
    if ranks.rank == 0:
        flops = step_flops(config, model_config)
        peak = matmul_rate(ranks.device, config.precision) * ranks.world_size
        sheet = datasheet_rate(ranks.device, config.precision)
    trainer = Trainer(
        config,
        dataset,
        context,
        state,
        total_steps=total_steps,
        last_step=total_steps,
        model=state.network if state.rows else ranks.wrap(state.network, config.gradient_dtype),
        schedule=objective_of(config.objective).schedule(config.num_timesteps),
        meter=Meter(config.global_batch_size, ranks.device, flops, peak, sheet and sheet * ranks.world_size),
        alignment=alignment,
        teacher=teacher,
        untried=compiled,
        compiled_update=update,
        graphs=graphs,
    )
    # If the time was up at an extra checkpoint, one more step is trained: a training ends in a regular checkpoint.
    if checkpoint is not None and checkpoint.regular and trainer.time_is_up:
        trainer.last_step = state.step
    return trainer


def _compiled(
    config: TrainConfig,
    state: TrainState,
    alignment: Alignment | None,
    teacher: Teacher | None,
    context: TrainContext,
    graphs: bool,
) -> CompiledUpdate | None:
    """Compile the parts of the model, and the update of its weights if that is Adan's; None for another optimizer."""
    masked = wants_graphs(config)
    if masked and not graphs and context.ranks.rank == 0:
        context.warn(
            "train.compile is reduce-overhead, but this training runs on a CPU, which has no CUDA graphs; it continues "
            "as with train.compile=true"
        )
    compile_parts(state.model, graphs=graphs)
    for network in (*(alignment.networks if alignment else ()), *([teacher.model] if teacher else [])):
        compile_parts(network)
    # An average that all ranks have is updated by each after the exchange, and not together with the weights.
    if config.optimizer != "adan" or (state.shards is not None and state.ema.whole):
        return None
    heads = state.heads() if state.rows is None else {name: p for name, p in state.own().items() if p.requires_grad}
    return CompiledUpdate(state.model, state.optimizer, state.ema, masked=masked, heads=heads)


def prepared_steps(trainer: Trainer) -> Iterator[tuple[LatentBatch, StepDraws]]:
    """This rank's batch and draws for each step from the state's step to the last, on the host.

    Raises UserError for latents that are not finite.
    """
    config, dataset, ranks = trainer.config, trainer.dataset, trainer.ranks
    first, last = trainer.state.step, trainer.last_step
    device = ranks.device
    plan = BatchPlan(config.seed, config.global_batch_size, config.mirror_prob, ranks.rank, ranks.world_size, device)
    with closing(batches_of(dataset, plan, first)) as batches:
        for batch in islice(batches, max(last - first, 0)):
            require_finite(batch)
            if trainer.tokens is not None:
                rows = trainer.tokens.gather(batch.indices, batch.mirror)
                batch = replace(batch, tokens=torch.from_numpy(rows))
            draws = draw_step(config, batch.step, trainer.state.model.config, trainer.share)
            yield batch, draws.pinned(device)


def _run(trainer: Trainer) -> None:
    """Train from the state's step to the last. A thread prepares steps ahead, so that no accelerator waits for data."""
    state, context, meter = trainer.state, trainer.context, trainer.meter
    steps = prefetched(prepared_steps(trainer), _STEPS_AHEAD)
    meter.begin()
    with closing(steps):
        while state.step < trainer.last_step:
            with meter.waiting():
                batch, draws = next(steps)
            skipped = batch.step in state.skipped
            signal = Signal.NOTHING if skipped else trainer.train_step(batch, draws)
            state.step += 1
            _count_time(trainer)
            if signal is not Signal.NOTHING or _is_due(trainer):
                signal = max(signal, trainer.settle())
            if signal is Signal.TIME_IS_UP:
                trainer.last_step = state.step
            _report(trainer)
            if signal is Signal.NEWS and (request := context.look()) is not Request.NOTHING:
                _handle(trainer, request)


def _count_time(trainer: Trainer) -> None:
    seconds = trainer.meter.step_done()
    if trainer.config.max_hours is not None:  # otherwise equal trainings would have different checkpoints
        trainer.state.seconds += seconds


def _roll_back(trainer: Trainer, error: NotFiniteError, initial: ReadInitial | None) -> None:
    """Return to the newest checkpoint, or to the start, and skip the step.

    Raises NotFiniteError after `max_rollbacks` rollbacks.
    """
    config, state, context = trainer.config, trainer.state, trainer.context
    trainer.unchecked = None
    rollbacks, skipped, seconds = state.rollbacks + 1, state.skipped | {error.step}, state.seconds
    if rollbacks > config.max_rollbacks:
        raise NotFiniteError(
            error.step,
            f"{error}; no rollback is left (max_rollbacks is {config.max_rollbacks}): lower lr, set max_grad_norm, or "
            "train in fp32",
        ) from error
    if (checkpoint := latest(context)) is None:
        restart(state, config, initial() if initial else None)
    else:
        restore(state, checkpoint, config, len(trainer.dataset))
    state.rollbacks, state.skipped, state.seconds = rollbacks, skipped, seconds
    if context.ranks.rank == 0:
        context.warn(
            f"{error}; rolled back to step {state.step}, continuing without step {error.step} "
            f"(rollback {rollbacks} of at most {config.max_rollbacks})"
        )
        context.report({"rollbacks": float(rollbacks)}, error.step)


def _is_due(trainer: Trainer) -> bool:
    """Whether `_report` writes something after this step."""
    config, step = trainer.config, trainer.state.step
    regularly = (config.log_every, config.checkpoint_every, config.keep_every, config.preview_every)
    return (
        step in (trainer.last_step, trainer.context.store.stable_step)
        or step in snapshot_steps(config, trainer.total_steps)
        or any(every is not None and step % every == 0 for every in regularly)
        or _validation_is_due(trainer)
    )


def _validation_is_due(trainer: Trainer) -> bool:
    """Whether the held-out loss after this step belongs in the history."""
    validation, step = trainer.validation, trainer.state.step
    return validation is not None and (step % validation.every == 0 or step == trainer.last_step)


def _report(trainer: Trainer) -> None:
    """Report the history's row and figures, and write the checkpoint and preview, where they are due after a step."""
    config, state, context = trainer.config, trainer.state, trainer.context
    at_end = state.step == trainer.last_step
    regular = state.step % config.checkpoint_every == 0 or at_end
    if (state.step % config.log_every == 0 or at_end) and state.history.pending:
        row = state.history.close_row(state.step, learning_rate(config, state.step - 1, trainer.total_steps))
        if context.ranks.rank == 0:
            context.report({**row, **trainer.meter.row()}, state.step)
    _take_snapshot(trainer)
    held_out_loss = _validate(trainer) if regular or _validation_is_due(trainer) else None
    if regular:
        _save(trainer, regular=True, held_out_loss=held_out_loss)
    elif state.step == context.store.stable_step or context.store.is_kept(state.step):
        _save(trainer, regular=False)
    every = config.preview_every
    if every is not None and (state.step % every == 0 or at_end):
        average = state.average()
        if context.ranks.rank == 0:
            context.preview(average, state.step)


def _take_snapshot(trainer: Trainer) -> None:
    """Write the power-function averages where that is due, before the checkpoint of the same step."""
    config, state, step = trainer.config, trainer.state, trainer.state.step
    due = step == trainer.last_step or step in snapshot_steps(config, trainer.total_steps)
    if config.ema_widths and due and _saves(trainer):
        trainer.context.store.save_snapshot(step, config, state.ema.of_widths)


def _validate(trainer: Trainer) -> float | None:
    """Measure the held-out loss, and report it where it is due; None if there is none, or it is not finite."""
    state, context, validation = trainer.state, trainer.context, trainer.validation
    if validation is None:
        return None
    values = validation.measure(state.average())
    if state.shards is not None:
        validation.release()
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if _validation_is_due(trainer):
        state.history.add_measurement(state.step, finite)
        if context.ranks.rank == 0:
            context.report(finite, state.step)
    if len(finite) < len(values) and context.ranks.rank == 0:
        context.warn(f"the held-out loss of step {state.step} is not finite, and is left out of the history")
    return finite.get(HELD_OUT_LOSS)


def _save(trainer: Trainer, *, regular: bool, held_out_loss: float | None = None) -> None:
    if not _saves(trainer):
        return
    checkpoint = to_checkpoint(trainer.state, trainer.config, len(trainer.dataset), regular=regular)
    if regular and trainer.validation is not None:
        checkpoint = replace(checkpoint, score=held_out_loss)
    trainer.context.store.save(checkpoint)


def _saves(trainer: Trainer) -> bool:
    """Whether this rank has a part in what is written: rank 0, and all of them if the state is divided."""
    return trainer.ranks.rank == 0 or trainer.state.shards is not None


def _handle(trainer: Trainer, request: Request) -> None:
    """Write an extra checkpoint, or end the training. Raises Stopped if the request is to stop."""
    step, context = trainer.state.step, trainer.context
    if request is Request.ENOUGH:
        trainer.last_step = step
    if step == trainer.last_step:
        return
    if step % trainer.config.checkpoint_every:
        _save(trainer, regular=False)
    context.store.flush()
    if request is Request.STOP:
        context.ranks.wait()  # so that the message is true on every rank: the checkpoint is written
        raise Stopped(f"stopped at step {step} of {trainer.total_steps}, a checkpoint is written")
