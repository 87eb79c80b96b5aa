"""Speed of the models: beside plain eager ones, beside the device's matrix products, and EDT beside MDTv2.

Ratios compare medians of the same run, measured in turns, because the speed of a shared machine drifts.

Legend: MACs are multiply-accumulates; the rate of matrix products counts each of them as two operations.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

from edt_core.acceptance.authors import plain_model
from edt_core.config import TrainConfig
from edt_core.diffusion import linear_schedule
from edt_core.models import (
    DiffusionTransformer,
    ModelConfig,
    count_parameters,
    macs_of,
    model_config,
    shadow,
    training_flops,
)
from edt_core.models.kernels import project_tokens
from edt_core.precision import use_precision
from edt_core.printing.console import say
from edt_core.training.draws import draw_step
from edt_core.training.estimate import saved
from edt_core.training.meter import matmul_rate
from edt_core.training.speed.compiled import compile_parts
from edt_core.training.step import StepInputs, accumulate_gradient
from jobs.benchmark.networks import made_model
from jobs.benchmark.plain import plain_precision
from jobs.benchmark.table import Row
from jobs.benchmark.train import in_turns

# Speed of EDT-S, -B and -XL relative to MDTv2 of their size, in inference and in training (arXiv 2410.23788).
_PAPER = {"S": (2.29, 3.93), "B": (2.29, 2.84), "XL": (2.22, 1.92)}
_LEAST_INFERENCE, _LEAST_TRAINING = 2.2, 1.92
_PLAIN_TARGETS = {("cpu", "fp32"): "at least 1.3", ("cuda", "bf16"): "at least 3"}  # of a forward pass of an EDT
_EXPECTED_SHARE = 0.3  # of the rate of matrix products, to estimate the time of a measurement
_UNCOUNTED_TURNS = 2

Passes = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class ModelBench:
    """The models to measure, and how. Rows that take longer than `limit_s`, or too much memory, are left out."""

    models: tuple[str, ...]
    image_sizes: tuple[int, ...]
    precisions: tuple[str, ...]
    device: torch.device
    batch_size: int = 8
    compile: bool = False
    turns: int = 5
    limit_s: float = 120.0
    processor_time: bool = False  # of this process; on a shared machine, wall time depends on other processes

    @property
    def plain_precision(self) -> str:
        return plain_precision(self.device)

    def what(self, kind: str, names: str, image_size: int, precision: str) -> str:
        compiled = ", compiled" if self.compile else ""
        return f"{kind}, {names} at {image_size}, {precision}, batch {self.batch_size}{compiled}"


def bench_models(bench: ModelBench) -> Iterator[list[Row]]:
    """The rows of each model at each size, then those of EDT beside MDTv2, as they are measured."""
    for image_size in bench.image_sizes:
        for name in bench.models:
            yield _rows_of_model(bench, model_config(name, image_size))
        for size in _PAPER:
            names = f"EDT-{size}/2", f"MDTv2-{size}/2"
            if set(names) <= set(bench.models):
                yield _rows_of_pair(bench, size, [model_config(name, image_size) for name in names])


# --- a model beside the plain one


def _rows_of_model(bench: ModelBench, config: ModelConfig) -> list[Row]:
    macs = {"forward": macs_of(config), "forward and backward": training_flops(config, masked=False) // 2}
    plain_shadow = plain_model(shadow(config))
    memory = 3 * _weight_bytes(config) + saved(plain_shadow, bench.batch_size, passes=1).activations
    reason = _left_out(bench, memory, 2 * sum(macs.values()) * (1 + len(bench.precisions)))
    if reason:
        return [Row(f"{config.name} at {config.image_size}", reason)]
    model = made_model(config).to(bench.device)
    plain = plain_model(model)
    if bench.compile:
        compile_parts(model)
    inputs = _inputs(bench, config)
    rows = []
    for kind, make in (("forward", _forward), ("forward and backward", _forward_backward)):
        passes: Passes = {precision: make(model, inputs, precision) for precision in bench.precisions}
        passes["plain"] = make(plain, inputs, bench.plain_precision)
        products = {f"product {precision}": _product(bench.device, precision) for precision in bench.precisions}
        rate = _rates(bench, {**passes, **products})
        rows += [_row_of_model(bench, config, kind, precision, rate, macs=macs[kind]) for precision in bench.precisions]
    return rows


def _row_of_model(
    bench: ModelBench, config: ModelConfig, kind: str, precision: str, rate: dict[str, float], macs: int
) -> Row:
    peak = rate[f"product {precision}"] / bench.batch_size * _side(bench.device) ** 3
    done = rate[precision] * macs
    target = ""
    if kind == "forward" and config.architecture == "edt":
        target = _PLAIN_TARGETS.get((bench.device.type, precision), "")
    return Row(
        bench.what(kind, config.name, config.image_size, precision),
        f"{rate[precision]:.2f} images/s, {done / 1e9:,.0f} GMAC/s, {done / peak:.0%} of matrix products "
        f"({peak / 1e9:,.0f} GMAC/s)",
        f"plain eager, {bench.plain_precision} {rate['plain']:.2f}/s",
        rate[precision] / rate["plain"],
        target,
    )


# --- EDT beside MDTv2 of its size


def _rows_of_pair(bench: ModelBench, size: str, configs: Sequence[ModelConfig]) -> list[Row]:
    """The speed of an EDT relative to the MDTv2: of forward passes, and of the full and masked training pass.

    A training pass is a step without its optimizer: the gradient of both losses. The number of steps to reach a quality
    is not part of it.
    """
    edt, mdt = configs
    macs = [macs_of(config) for config in configs]
    flops = [training_flops(config, masked=True) for config in configs]
    memory = sum(2 * _weight_bytes(config) for config in configs)
    memory += max(saved(shadow(config).train(), bench.batch_size, passes=2).activations for config in configs)
    names = f"{edt.name} and {mdt.name}"
    if reason := _left_out(bench, memory, (2 * sum(macs) + sum(flops)) * len(bench.precisions)):
        return [Row(f"{names} at {edt.image_size}", reason)]
    models = [made_model(config).to(bench.device) for config in configs]
    if bench.compile:
        for model in models:
            compile_parts(model)
    rows = []
    for kind, make, counted, paper, least in (
        ("inference", _forward_of, macs, _PAPER[size][0], _LEAST_INFERENCE),
        ("training pass", _training_pass, flops, _PAPER[size][1], _LEAST_TRAINING),
    ):
        for precision in bench.precisions:
            pairs = zip(("edt", "mdt"), models, strict=True)
            rate = _rates(bench, {name: make(bench, model, precision) for name, model in pairs})
            rows.append(
                Row(
                    bench.what(kind, names, edt.image_size, precision),
                    f"EDT {rate['edt']:.2f} images/s; the MDTv2 has {counted[1] / counted[0]:.2f} times the MACs",
                    f"MDTv2 {rate['mdt']:.2f}/s",
                    rate["edt"] / rate["mdt"],
                    f"at least {least}; the paper's {paper}",
                )
            )
    return rows


def _training_pass(bench: ModelBench, model: DiffusionTransformer, precision: str) -> Callable[[], object]:
    """The gradient of full and masked loss as in training, with the masks of another step each time."""
    config = TrainConfig(
        model=model.config.name, global_batch_size=bench.batch_size, precision=precision, compile=bench.compile
    )
    schedule = linear_schedule(config.num_timesteps)
    x, t, y = _inputs(bench, model.config)
    draws = [draw_step(config, step, model.config) for step in range(bench.turns + _UNCOUNTED_TURNS)]
    steps = cycle([StepInputs(x, y, t, torch.ones_like(t, dtype=torch.float32), d.to(bench.device)) for d in draws])

    def run() -> None:
        use_precision(precision)
        accumulate_gradient(model.train(), config, schedule, next(steps), model.config.num_classes)
        model.zero_grad(set_to_none=True)

    return run


# --- the passes, and whether they are measured


def _inputs(bench: ModelBench, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    n = bench.batch_size
    x = torch.randn(n, config.in_channels, config.latent_size, config.latent_size, device=bench.device)
    return x, torch.arange(n, device=bench.device) * 999 // n, torch.arange(n, device=bench.device) % config.num_classes


def _forward_of(bench: ModelBench, model: DiffusionTransformer, precision: str) -> Callable[[], object]:
    return _forward(model, _inputs(bench, model.config), precision)


def _forward(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], precision: str) -> Callable[[], object]:
    """A forward pass in evaluation mode."""

    def run() -> None:
        use_precision(precision)
        with torch.no_grad(), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
            model.eval()(*inputs)

    return run


def _forward_backward(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], precision: str) -> Callable[[], object]:
    """A full training pass with its gradient."""

    def run() -> None:
        use_precision(precision)
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model.train()(*inputs)
        output.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def _product(device: torch.device, precision: str) -> Callable[[], object]:
    """A large product of square matrices."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(1, _side(device), _side(device), device=device, dtype=dtype) for _ in range(2))

    def run() -> None:
        use_precision(precision)
        project_tokens(a, b[0])

    return run


def _side(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 2048


def _rates(bench: ModelBench, passes: Passes) -> dict[str, float]:
    """Images a second of each pass, in turns."""
    clock = time.process_time if bench.processor_time else time.perf_counter
    seconds = in_turns(passes, bench.turns, bench.device, clock)
    return {name: bench.batch_size / duration for name, duration in seconds.items()}


def _weight_bytes(config: ModelConfig) -> int:
    return 4 * count_parameters(shadow(config))


def _left_out(bench: ModelBench, memory: int, flops_per_image: int) -> str:
    """Why a measurement is left out, its memory (bytes) or its time; empty if it is not."""
    free = _free_memory(bench.device)
    if memory > free:
        return f"left out: takes about {memory / (1 << 30):.1f} GiB, and {free / (1 << 30):.1f} GiB are free"
    rate = _EXPECTED_SHARE * matmul_rate(bench.device, bench.plain_precision)
    seconds = flops_per_image * bench.batch_size * (bench.turns + _UNCOUNTED_TURNS) / rate
    if seconds > bench.limit_s:
        return f"left out: takes about {seconds:,.0f} s; --limit-s is {bench.limit_s:g}"
    say(f"bench: the next rows take about {seconds:,.0f} s", err=True)
    return ""


def _free_memory(device: torch.device) -> int:
    """Bytes of free memory; unlimited on a system that does not state them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    information = Path("/proc/meminfo")
    if not information.exists():
        return sys.maxsize
    lines = dict(line.split(":") for line in information.read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
