"""Speed of training: its step alone, beside a plain step, in the whole loop, on several workers; checkpoints, draws.

The two sides of a ratio are measured in the same run, in turns, because the speed of a shared machine drifts.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from edt_core.acceptance.authors import PlainStep
from edt_core.acceptance.subjects import step_inputs
from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.data.scale import LatentScale
from edt_core.data.subsets import share
from edt_core.diffusion import linear_schedule
from edt_core.models import ModelConfig, model_config, training_flops
from edt_core.precision import use_precision
from edt_core.training.context import LocalContext, Request
from edt_core.training.draws import draw_step
from edt_core.training.loop import train
from edt_core.training.meter import datasheet_rate, device_memory, matmul_rate
from edt_core.training.optim import gradient_norm
from edt_core.training.ranks import Ranks
from edt_core.training.speed.compiled import compile_parts
from edt_core.training.state import initial_state, to_checkpoint
from edt_core.training.step import StepInputs, accumulate_gradient
from jobs.benchmark.table import Row, mib
from jobs.runtime.loopback import INTERFACES

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("tf32", "bf16")}
_STEPS_BETWEEN_CHECKPOINTS = 1000
_BATCHES_OF_DRAWS, _SHARE_OF_DRAWS = (256, 1024), 8
_WARM_UP = 6  # first steps of a loop, in which its memory grows
_PLAIN_TARGETS = {("cpu", "fp32"): "at least 1.25", ("cpu", "bf16"): "at least 1.8", ("cuda", "bf16"): "at least 3"}


@dataclass(frozen=True)
class Subject:
    """The subject of a benchmark: a named model at an image size, trained in steps of `batch_size` images."""

    model: str = "EDT-S/2"
    image_size: int = 256
    batch_size: int = 8
    compile: bool = False

    @property
    def model_config(self) -> ModelConfig:
        return model_config(self.model, self.image_size)

    def train_config(self, precision: str, **more: Any) -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "model": self.model,
                "global_batch_size": self.batch_size,
                "precision": precision,
                "compile": self.compile,
                **more,
            }
        )


def bench_train(work: Path, subject: Subject, precisions: tuple[str, ...], turns: int) -> Iterator[list[Row]]:
    """The rows of each measurement once it is done; every step is measured `turns` times."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, seconds = _steps(subject, precisions, device, turns)
    yield rows
    yield [_loop(work / "loop", subject, precisions[-1], device, turns)]
    yield [_checkpoints(work / "checkpoints", subject, precisions[-1], device, seconds[precisions[-1]])]
    yield [_draws(subject, batch, turns) for batch in _BATCHES_OF_DRAWS]
    workers = 2 if device.type == "cpu" else torch.cuda.device_count()
    if workers > 1:
        yield [_workers(subject, precisions[0], device, workers, turns)]


# --- the step alone, and beside a plain one


class BareStep:
    """Our training step without loop, loader and logging, repeated on the same inputs."""

    def __init__(self, config: TrainConfig, model: ModelConfig, inputs: StepInputs, ranks: Ranks) -> None:
        self.config, self.inputs = config, inputs
        self.state = initial_state(config, model, ranks.device)
        if config.compile:
            compile_parts(self.state.model)
        self.model = ranks.wrap(self.state.model, config.gradient_dtype)
        self.schedule = linear_schedule(config.num_timesteps)

    def __call__(self) -> Tensor:
        """One step; losses without gradient, [4, N]: squared error of the full and masked pass, then their bounds."""
        use_precision(self.config.precision)
        state = self.state
        state.optimizer.zero_grad(set_to_none=True)
        null_label = state.model.config.num_classes
        losses = accumulate_gradient(self.model, self.config, self.schedule, self.inputs, null_label)
        gradient_norm(state.model.parameters())
        state.optimizer.step()
        state.ema.update()
        return losses


def in_turns(
    steps: Mapping[str, Callable[[], object]],
    turns: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each step, one of each per turn, after two turns of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 2):
        for name, step in steps.items():
            duration = _seconds(step, device, clock)
            if turn >= 2:
                seconds[name].append(duration)
    return {name: statistics.median(durations) for name, durations in seconds.items()}


def _seconds(step: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def _steps(
    subject: Subject, precisions: tuple[str, ...], device: torch.device, turns: int
) -> tuple[list[Row], dict[str, float]]:
    """Rows of the step in each precision, alone and beside the plain step; and the seconds of each."""
    model, ranks = subject.model_config, Ranks(device=device)
    inputs = step_inputs(subject.train_config(precisions[0]), model, device)
    bare = {name: BareStep(subject.train_config(name), model, inputs, ranks) for name in precisions}
    memory = {name: _peak_memory(step, device) for name, step in bare.items()}
    plain_precision = "fp32" if device.type == "cpu" else "tf32"
    config = subject.train_config(plain_precision)
    state = initial_state(config, model, device)
    plain = PlainStep(config, state.model, inputs)
    seconds = in_turns({**bare, "plain": plain}, turns, device)

    flops = training_flops(state.model.config, masked=config.masked_loss)
    plain_rate = subject.batch_size / seconds["plain"]
    rows = []
    for precision in precisions:
        what = f"step, {subject.model} at {subject.image_size}, {precision}, batch {subject.batch_size}"
        rate = subject.batch_size / seconds[precision]
        figure = f"{rate:.2f} images/s, {seconds[precision]:.3f} s, process peak {mib(memory[precision])}"
        peak = matmul_rate(device, precision)
        against = f"plain step, {plain_precision} {plain_rate:.2f}/s"
        target = _PLAIN_TARGETS.get((device.type, precision), "")
        beside = f"measured MFU: matrix products {peak / 1e9:,.0f} GFLOP/s"
        rows.append(Row(what, figure, beside, rate * flops / peak))
        if sheet := datasheet_rate(device, precision):
            rows.append(Row(what, figure, f"data-sheet MFU: {sheet / 1e12:,.1f} TFLOP/s", rate * flops / sheet))
        rows.append(Row(what, f"{rate:.2f} images/s", against, rate / plain_rate, target))
    return rows, seconds


def _peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes during a step; on the CPU, of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    return device_memory(device)


# --- the whole loop, and the cost of a checkpoint


def _loop(work: Path, subject: Subject, precision: str, device: torch.device, turns: int) -> Row:
    """The loop on latent shards, with a history row at each step, and a bare step after each of its steps."""
    model, steps = subject.model_config, _WARM_UP + 2 * turns
    dataset = LatentDataset([_latents(work, model, rows=max(4 * subject.batch_size, 64))])
    config = subject.train_config(precision, max_steps=steps, log_every=1, checkpoint_every=steps)
    bare = BareStep(config, model, step_inputs(config, model, device), Ranks(device=device))
    in_loop, alone = [], []
    ended = time.perf_counter()

    def bare_step() -> Request:
        nonlocal ended
        in_loop.append(time.perf_counter() - ended)
        alone.append(_seconds(bare, device))
        ended = time.perf_counter()
        return Request.NOTHING

    context = LocalContext(work / "checkpoints", Ranks(device=device), request=bare_step)
    train(config, model, dataset, context)
    ours, theirs = (statistics.median(seconds[_WARM_UP:]) for seconds in (in_loop, alone))
    waited = statistics.median(row["data_wait_share"] for row in context.reported[_WARM_UP:])
    return Row(
        f"training loop, {subject.model}, {precision}, batch {subject.batch_size}, logging each step",
        f"{subject.batch_size / ours:.2f} images/s, {100 * waited:.2f} % waiting for data",
        f"bare step {subject.batch_size / theirs:.2f}/s",
        theirs / ours,
        "at least 0.97",
    )


def _latents(folder: Path, model: ModelConfig, rows: int) -> Path:
    """A latent shard of random posteriors that fit the model."""
    shape = (model.in_channels, model.latent_size, model.latent_size)
    folder.mkdir(parents=True)
    path = folder / "latents-00000.arrow"
    values = np.random.default_rng(0).random((rows, 2, 2, *shape), dtype=np.float32)  # of image and mirror: mean, std
    with LatentShardWriter(
        path, LatentInfo("benchmark", LatentScale(1.0), model.image_size, shape, "images-00000.tar")
    ) as writer:
        writer.write([f"{i:08d}" for i in range(rows)], np.arange(rows) % model.num_classes, values)
    return path


def _checkpoints(work: Path, subject: Subject, precision: str, device: torch.device, step_s: float) -> Row:
    """The largest cost of a checkpoint, as if none of its writing overlapped with steps, as a share of the steps."""
    config = subject.train_config(precision)
    state = initial_state(config, subject.model_config, device)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # creates the state that a checkpoint contains
    context = LocalContext(work, Ranks(device=device), num_to_keep=1)
    waited, written = [], []
    for state.step in range(1, 5):
        started = time.perf_counter()
        context.store.save(to_checkpoint(state, config, num_samples=1))
        waited.append(time.perf_counter() - started)
        context.store.flush()
        written.append(time.perf_counter() - started)
    # the first one also allocates the memory that the others are copied to
    blocked, whole = statistics.median(waited[1:]), statistics.median(written[1:])
    between = _STEPS_BETWEEN_CHECKPOINTS * step_s
    return Row(
        f"checkpoint, {subject.model}",
        f"the loop waits {blocked:.3f} s (first time {waited[0]:.3f} s), written in {whole:.2f} s",
        f"{_STEPS_BETWEEN_CHECKPOINTS} steps, {between:.0f} s",
        whole / between,
        "under 0.02",
    )


# --- the random numbers


def _draws(subject: Subject, batch: int, turns: int) -> Row:
    """Images a second for which one thread draws the random numbers if it draws for one of 8 ranks, or for all."""
    config, model = subject.train_config("fp32", global_batch_size=batch), subject.model_config
    steps = {
        "all": lambda: draw_step(config, 0, model),
        "share": lambda: draw_step(config, 0, model, share(batch, 0, _SHARE_OF_DRAWS)),
    }
    seconds = in_turns(steps, turns, torch.device("cpu"), time.thread_time)
    return Row(
        f"draws, {subject.model} at {subject.image_size}, batch {batch}, 1/{_SHARE_OF_DRAWS} of it, processor time",
        f"{batch / seconds['share']:,.0f} images/s, {1e3 * seconds['share']:.1f} ms a step",
        f"all of it {batch / seconds['all']:,.0f}/s",
        seconds["all"] / seconds["share"],
        "at least 5",
    )


# --- several workers


def _workers(subject: Subject, precision: str, device: torch.device, workers: int, turns: int) -> Row:
    """The bare step on several workers beside one, with the same batch per worker; one GPU or one thread for each."""
    rates: dict[int, list[float]] = {1: [], workers: []}
    for world_size in (1, workers, 1, workers):
        images = world_size * subject.batch_size
        config = subject.train_config(precision, global_batch_size=images, num_workers=world_size)
        seconds = _seconds_of_workers(config, subject.model_config, device.type, max(1, turns // 2))
        rates[world_size].append(images / seconds)
    one, many = max(rates[1]), max(rates[workers])
    each = "one thread" if device.type == "cpu" else "one GPU"
    return Row(
        f"{workers} workers, {subject.model}, {precision}, batch {subject.batch_size} each, {each}",
        f"{many:.2f} images/s",
        f"1 worker {one:.2f}/s",
        many / one,
        "at least 1.6" if workers == 2 else "",
    )


def _seconds_of_workers(config: TrainConfig, model: ModelConfig, device: str, turns: int) -> float:
    """Median seconds of a step on the configured number of processes, which are started here."""
    world_size = config.worker_range[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (config, model, device, turns, folder), nprocs=world_size)
        return float(Path(folder, "seconds").read_text(encoding="utf-8"))


def _worker(rank: int, config: TrainConfig, model: ModelConfig, device: str, turns: int, folder: str) -> None:
    """One process; rank 0 writes the seconds of its steps, which end when gradients are exchanged, to a file."""
    world_size = config.worker_range[1]
    os.environ.update(INTERFACES)
    if device == "cpu":
        torch.set_num_threads(1)
        here, backend = torch.device("cpu"), "gloo"
    else:
        torch.cuda.set_device(rank)
        here, backend = torch.device("cuda", rank), "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    inputs = step_inputs(config, model, here).rows(share(config.global_batch_size, rank, world_size))
    step = BareStep(config, model, inputs, Ranks(rank, world_size, here))
    seconds = in_turns({"step": step}, turns, here)["step"]
    if rank == 0:
        Path(folder, "seconds").write_text(str(seconds), encoding="utf-8")
    dist.destroy_process_group()
