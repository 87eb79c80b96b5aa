"""Section C: images per second of training, where the time of a step goes, and its memory.

The step is that of the training loop, with its copies to the device and its check, on a few batches in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch

from edt_core.acceptance import attention_forms
from edt_core.acceptance.adan import Adan
from edt_core.acceptance.authors import AuthorsStep, PlainStep
from edt_core.acceptance.machine import card_of
from edt_core.acceptance.options import training
from edt_core.acceptance.rows import Measure, Task, at_most, figure
from edt_core.acceptance.subjects import (
    Setting,
    has_library_adan,
    in_turns,
    latent_dataset,
    new_state,
    random_model,
    relative_error,
    some_steps,
    step_inputs,
    synchronize,
    timed,
    trainer_of,
)
from edt_core.diffusion import objective_of
from edt_core.models import ModelConfig, training_flops
from edt_core.precision import use_precision
from edt_core.training.estimate import estimate
from edt_core.training.meter import datasheet_rate_of, device_memory, matmul_rate
from edt_core.training.optim import gradient_norm, make_optimizer
from edt_core.training.ranks import Ranks
from edt_core.training.speed.compiled import compile_parts
from edt_core.training.state import TrainState
from edt_core.training.step import step_losses

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_TURNS, _WARM_UP = 20, 5
_FIRST_STEPS, _LOSS_BOUND = 5, 5e-3  # sums of a GPU in another order make about 1e-4; inputs of another step, 0.1
_MIB = 1 << 20
_IMAGES = "images/s"


@dataclass(frozen=True)
class Case:
    """A model with a batch; about the seconds to compile it on an H100, and the GiB of its step in bf16."""

    model: str
    batch: int
    compile_s: float
    gib: float


LARGE_BATCH, LARGE_MODEL = Case("EDT-S/2", 256, 45, 18), Case("EDT-XL/2", 64, 75, 45)
SMALL_BATCH = Case("EDT-S/2", 32, 45, 4)
OTHERS = (Case("EDT-S/2", 64, 45, 6), SMALL_BATCH, Case("EDT-B/2", 128, 45, 25))
_EAGER, _BOTH, _COMPILED = ("eager",), ("eager", "compiled"), ("compiled",)


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of matrix products on the device in a precision: measured, and of the data sheet."""

    measured: float
    stated: float | None


def tasks(setting: Setting) -> Iterator[Task]:
    """The most telling figures first: what is left when the time is up is skipped."""
    peaks: dict[str, Peaks] = {}
    yield Task("matrix products", lambda: peak_rows(setting, peaks), setting.seconds(3), setting.gib(1))
    yield _step_task(LARGE_BATCH, _BOTH, setting, peaks)
    yield _plain_task(LARGE_BATCH, setting, peaks)
    if setting.is_full:
        for case in OTHERS:
            yield _step_task(case, _EAGER, setting, peaks)
            yield _plain_task(case, setting, peaks)
        if setting.authors is not None:
            yield Task("the authors' code", lambda: authors_rows(LARGE_BATCH, setting, peaks), 10, 50)
    if setting.is_full:
        yield _step_task(LARGE_MODEL, _BOTH, setting, peaks)
        yield _plain_task(LARGE_MODEL, setting, peaks)
    for case in (LARGE_MODEL, LARGE_BATCH) if setting.is_full else (LARGE_BATCH,):
        name, gib = setting.model(case.model).name, setting.gib(case.gib)
        yield Task(f"{name}, optimizers", partial(optimizer_rows, case, setting), setting.seconds(15), gib)
        yield Task(f"{name}, parts of a step", partial(part_rows, case, setting), setting.seconds(8), gib)
    yield from attention_forms.tasks(setting)
    graphs = f"{setting.model(SMALL_BATCH.model).name}, CUDA graphs"
    yield Task(graphs, partial(graph_rows, SMALL_BATCH, setting), setting.seconds(110), setting.gib(8))
    if setting.is_full:
        for case in reversed(OTHERS):
            yield _step_task(case, _COMPILED, setting, peaks)


def _step_task(case: Case, kinds: tuple[str, ...], setting: Setting, peaks: dict[str, Peaks]) -> Task:
    seconds = 8 + (case.compile_s if "compiled" in kinds else 0)
    name = f"{setting.model(case.model).name} at {case.batch}, {' and '.join(kinds)}"
    run = partial(step_rows, case, kinds, setting, peaks)
    return Task(name, run, setting.seconds(seconds), setting.gib(case.gib))


def _plain_task(case: Case, setting: Setting, peaks: dict[str, Peaks]) -> Task:
    name = f"{setting.model(case.model).name} at {case.batch}, plain"
    return Task(name, partial(plain_rows, case, setting, peaks), setting.seconds(8), setting.gib(1.7 * case.gib))


def peak_rows(setting: Setting, peaks: dict[str, Peaks]) -> Iterator[Measure]:
    """The rate of a large product in each precision, beside the data sheet."""
    card = card_of(setting.device)
    for precision in ("bf16", "tf32", "fp32") if setting.on_gpu else ("bf16", "fp32"):
        use_precision(precision)
        stated = datasheet_rate_of(card, precision)
        peaks[precision] = Peaks(matmul_rate(setting.device, precision, setting.count(300, 20) / 1000), stated)
        note = "not in the table of data sheets" if stated is None else f"data sheet {stated / 1e12:,.0f}"
        yield figure(f"matrix product, {precision}", peaks[precision].measured / 1e12, "TFLOP/s", note)


def options_of(case: Case, setting: Setting, **fields: Any) -> TrainConfig:
    """The training of a case."""
    batch = setting.count(case.batch, 2)
    return training(model=case.model, global_batch_size=batch, max_steps=10_000, use_gpu=setting.on_gpu, **fields)


def step_rows(case: Case, kinds: tuple[str, ...], setting: Setting, peaks: dict[str, Peaks]) -> Iterator[Measure]:
    """The step in bf16, eager or with the parts of the model compiled, or first the one and then the other."""
    config = setting.model(case.model)
    options = options_of(case, setting, precision="bf16")
    use_precision("bf16")
    state = new_state(options, config, setting.device)
    name = f"{config.name} at {options.global_batch_size}, bf16"
    for kind in kinds:
        if kind == "compiled":
            compile_parts(state.model, setting.backend)
        step = _step(options, config, state, setting)
        first = timed(step, setting.device)
        if kind == "compiled":
            yield figure(f"{name} {kind}: first step", first, "s", "with its compilation")
        memory = _peak_memory(step, setting)
        duration = in_turns({kind: step}, setting.count(_TURNS), setting.count(_WARM_UP, 0), setting.device)[kind]
        rate, key = options.global_batch_size / duration, f"{case.model} {kind}"
        setting.rates[key] = max(rate, setting.rates.get(key, 0.0))
        yield from _rate_rows(f"{name} {kind}", rate, config, "bf16", peaks)
        yield _memory_row(f"{name} {kind}", memory, options, config)


def graph_rows(case: Case, setting: Setting) -> Iterator[Measure]:
    """The compiled step with and without CUDA graphs: the losses of its first steps, and its rate."""
    config, options = setting.model(case.model), options_of(case, setting, precision="bf16")
    name = f"{config.name} at {options.global_batch_size}, bf16 compiled"
    if not setting.on_gpu:
        yield Measure(f"{name}, CUDA graphs", None, note="not run: a CPU has no CUDA graphs")
        return
    use_precision("bf16")
    losses = []
    for graphs in (False, True):
        state = new_state(options, config, setting.device)
        compile_parts(state.model, setting.backend, graphs=graphs)
        step = _step(options, config, state, setting, graphs=graphs)
        losses.append(first_losses(step, state))
        duration = in_turns({"step": step}, setting.count(_TURNS), setting.count(_WARM_UP, 0), setting.device)["step"]
        title = f"{name}, {'with' if graphs else 'without'} CUDA graphs"
        yield figure(title, options.global_batch_size / duration, _IMAGES)
    plain, graphed = losses
    text = f"{name}: losses of {_FIRST_STEPS} steps with CUDA graphs against without"
    yield at_most(text, relative_error(graphed, plain), _LOSS_BOUND, "rel. rms")


def first_losses(step: Callable[[], object], state: TrainState) -> torch.Tensor:
    """The losses of the next steps, float64 [steps]."""
    for _ in range(_FIRST_STEPS):
        step()
    return torch.tensor([row["loss"] for row in state.history.pending[-_FIRST_STEPS:]], dtype=torch.float64)


def _step(
    options: TrainConfig, config: ModelConfig, state: TrainState, setting: Setting, *, graphs: bool = False
) -> Callable[[], object]:
    """The step of the training loop, on a few batches in turn. `graphs`: the parts of the model are CUDA graphs."""
    dataset = latent_dataset(setting.work, config, setting.count(2048, 64))
    trainer = trainer_of(options, dataset, state, setting.work, Ranks(device=setting.device))
    trainer.graphs = graphs
    steps = cycle(some_steps(trainer, 2))
    return lambda: trainer.train_step(*next(steps))


def _peak_memory(step: Callable[[], object], setting: Setting) -> int:
    """Peak bytes of a step; on a CPU, of the process so far."""
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    step()
    synchronize(setting.device)
    return device_memory(setting.device)


def _rate_rows(
    name: str, rate: float, config: ModelConfig, precision: str, peaks: dict[str, Peaks]
) -> Iterator[Measure]:
    yield figure(name, rate, _IMAGES)
    if precision not in peaks:
        return
    flops, peak = rate * training_flops(config, masked=config.is_masked), peaks[precision]
    yield figure(f"{name}: MFU of the measured product", flops / peak.measured)
    if peak.stated is not None:
        yield figure(f"{name}: MFU of the data sheet", flops / peak.stated)


def _memory_row(name: str, memory: int, options: TrainConfig, config: ModelConfig) -> Measure:
    expected = estimate(options, config, 1).memory
    note = f"estimated {expected / _MIB:,.0f} MiB, measured / estimated {memory / expected:.3f}"
    return figure(f"{name}: peak memory", memory / _MIB, "MiB", note)


def plain_rows(case: Case, setting: Setting, peaks: dict[str, Peaks]) -> Iterator[Measure]:
    """The plain step: eager, TF32 on a GPU, scores written out, parameter by parameter."""
    config, precision = setting.model(case.model), "tf32" if setting.on_gpu else "fp32"
    options = options_of(case, setting, precision=precision)
    plain = PlainStep(options, random_model(config, setting.device), step_inputs(options, config, setting.device))
    turns = setting.count(_TURNS)
    duration = in_turns({"plain": plain}, turns, setting.count(_WARM_UP, 0), setting.device)["plain"]
    name = f"{config.name} at {options.global_batch_size}, plain {precision}, {type(plain.optimizer).__name__}"
    yield from _rate_rows(name, options.global_batch_size / duration, config, precision, peaks)


def authors_rows(case: Case, setting: Setting, peaks: dict[str, Peaks]) -> Iterator[Measure]:
    """The authors' own model in TF32: a full and a masked pass, AdamW."""
    assert setting.authors is not None
    config, batch = setting.model(case.model), setting.count(case.batch, 2)
    use_precision("tf32" if setting.on_gpu else "fp32")
    step = AuthorsStep(setting.authors, case.model, random_model(config, setting.device), batch, setting.device)
    duration = in_turns({"step": step}, setting.count(_TURNS), setting.count(_WARM_UP, 0), setting.device)["step"]
    yield from _rate_rows(f"{config.name} at {batch}, the authors' code, tf32", batch / duration, config, "tf32", peaks)


def part_rows(case: Case, setting: Setting) -> Iterator[Measure]:
    """Milliseconds of the parts of an eager bf16 step, by events on the device's own clock."""
    config = setting.model(case.model)
    options = options_of(case, setting, precision="bf16")
    use_precision("bf16")
    state, inputs = new_state(options, config, setting.device), step_inputs(options, config, setting.device)
    schedule = objective_of(options.objective).schedule(options.num_timesteps)
    loss: list[torch.Tensor] = []

    def forward() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        losses = step_losses(state.model, options, schedule, inputs, config.num_classes)
        loss[:] = [losses.loss.sum() / options.global_batch_size]

    parts: dict[str, Callable[[], object]] = {
        "forward": forward,
        "backward": lambda: loss.pop().backward(),
        "gradient norm": lambda: gradient_norm(state.model.parameters()),
        "optimizer": state.optimizer.step,
        "average": state.ema.update,
    }
    milliseconds = part_times(parts, setting.count(_TURNS), setting.device)
    whole = sum(milliseconds.values())
    for part, duration in milliseconds.items():
        name = f"{config.name} at {options.global_batch_size}, bf16 eager: {part}"
        yield figure(name, duration, "ms", f"{100 * duration / whole:.0f} % of the step")


def part_times(parts: dict[str, Callable[[], object]], turns: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of parts that follow one another, without waiting for the device between them."""
    durations: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(turns + 1):  # the first one warms up
        if device.type == "cuda":
            found = _by_events(parts, device)
        else:
            found = {name: 1000 * timed(part, device) for name, part in parts.items()}
        if turn:
            for name, duration in found.items():
                durations[name].append(duration)
    return {name: statistics.median(values) for name, values in durations.items()}


def _by_events(parts: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    events[0].record()
    for part, event in zip(parts.values(), events[1:], strict=True):
        part()
        event.record()
    torch.cuda.synchronize(device)
    return {name: events[i].elapsed_time(events[i + 1]) for i, name in enumerate(parts)}


def optimizer_rows(case: Case, setting: Setting) -> Iterator[Measure]:
    """Milliseconds of an update of all weights: Adan as the training makes it, Adan compiled, AdamW fused."""
    config = setting.model(case.model)
    parameters = list(random_model(config, setting.device).parameters())
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.ones_like(parameter)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "Adan by lists": lambda: Adan(trained, 1e-3),
        "AdamW fused": lambda: torch.optim.AdamW(trained, lr=1e-3, fused=True),
    }
    if setting.is_full:
        kinds["Adan compiled"] = lambda: Adan(trained, 1e-3, compile_with=setting.compiled)
    if has_library_adan():
        kinds = {"Adan of the training": lambda: make_optimizer(options_of(case, setting), trained), **kinds}
    for kind, make in kinds.items():
        optimizer = make()
        first = timed(optimizer.step, setting.device)
        seconds = in_turns({kind: optimizer.step}, setting.count(_TURNS), 1, setting.device)[kind]
        note = f"first call {first:.1f} s; {sum(p.numel() for p in trained):,} parameters"
        yield figure(f"{config.name}: {kind}", 1000 * seconds, "ms", note)
        del optimizer
