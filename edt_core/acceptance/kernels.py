"""Section B: the kernels that a step of training and a step of sampling launch, by PyTorch's profiler."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from edt_core.acceptance.options import chain, training
from edt_core.acceptance.rows import Measure, Task, at_least, at_most, figure
from edt_core.acceptance.subjects import Setting, latent_dataset, new_state, randomized, some_steps, trainer_of
from edt_core.models import ModelConfig
from edt_core.precision import use_precision
from edt_core.sampling.sampler import LatentSampler
from edt_core.training.ranks import Ranks

# Kernels of attention that do not store the scores: cutlass, flash and cuDNN on a GPU; the name of PyTorch's operator
# on a CPU, which has no kernels.
_FUSED = re.compile(r"fmha|flash|sdpa|efficient_attention")
_SOFTMAX = re.compile(r"softmax", re.IGNORECASE)
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # the profile ends with that of the device
_LAUNCH = re.compile(r"^(cuda|cu)LaunchKernel")
_BATCH, _SHOWN = 16, 3


@dataclass(frozen=True)
class Trace:
    """How often each kernel ran (on a CPU: each operator), and each call of the driver on the host."""

    kernels: Counter[str]
    calls: Counter[str]

    def fused(self) -> Counter[str]:
        """Fused attention."""
        return Counter({name: n for name, n in self.kernels.items() if _FUSED.search(name)})

    def softmaxes(self) -> int:
        """Kernels of a softmax, which has all scores [N, H, T, T] in memory."""
        return sum(n for name, n in self.kernels.items() if _SOFTMAX.search(name) and not _FUSED.search(name))

    def copies(self, word: str) -> int:
        """Copies between host and device whose name contains a word."""
        return sum(n for name, n in self.kernels.items() if name.startswith("Memcpy") and word in name)


def tasks(setting: Setting) -> Iterator[Task]:
    """Training and sampling in bf16 and fp32; at a small scale in bf16."""
    config = setting.model("EDT-S/2")
    for precision in ("bf16", "fp32") if setting.is_full else ("bf16",):
        yield Task(
            f"{config.name} training {precision}",
            partial(training_rows, config, precision, setting),
            setting.seconds(6),
        )
        yield Task(
            f"{config.name} sampling {precision}",
            partial(sampling_rows, config, precision, setting),
            setting.seconds(5),
        )


def traced(function: Callable[[], object], device: torch.device) -> Trace:
    """What a call launches, after one call to warm up."""
    function()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        function()
        if on_gpu:
            torch.cuda.synchronize(device)
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events() or []:
        is_kernel = _is_on_gpu(event) if on_gpu else event.name.startswith("aten::")
        (kernels if is_kernel else calls)[event.name] += 1
    return Trace(kernels, calls)


def _is_on_gpu(event: Any) -> bool:
    return bool(event.device_type == torch.autograd.DeviceType.CUDA)


def training_rows(config: ModelConfig, precision: str, setting: Setting) -> Iterator[Measure]:
    """Kernels of the step of a training, its copies, and how often the host waits."""
    use_precision(precision)
    options = training(global_batch_size=setting.count(_BATCH, 2), precision=precision, max_steps=100)
    dataset = latent_dataset(setting.work, config, 64)
    state = new_state(options, config, setting.device)
    trainer = trainer_of(options, dataset, state, setting.work, Ranks(device=setting.device))
    ((batch, draws),) = some_steps(trainer, 1)
    trace = traced(lambda: trainer.train_step(batch, draws), setting.device)
    name = f"{config.name} training {precision}"
    if not setting.on_gpu:  # a CPU's fused kernel has no gradient of the bias
        yield figure(f"{name}: operators", sum(trace.kernels.values()), "a step", _names(trace.kernels))
        return
    yield from _attention_rows(name, trace)
    yield figure(f"{name}: kernels", sum(trace.kernels.values()), "a step", _names(trace.kernels))
    yield figure(f"{name}: launches", sum(n for call, n in trace.calls.items() if _LAUNCH.match(call)), "a step")
    yield figure(f"{name}: copies from pinned memory", trace.copies("Pinned -> Device"), "a step")
    yield figure(f"{name}: copies from other host memory", trace.copies("Pageable -> Device"), "a step")
    waits = Counter({call: trace.calls[call] for call in _WAITS if trace.calls[call]})
    yield figure(f"{name}: calls that can wait for the device", sum(waits.values()), "a step", _names(waits))


def sampling_rows(config: ModelConfig, precision: str, setting: Setting) -> Iterator[Measure]:
    """Kernels of a chain of two guided steps."""
    use_precision(precision)
    model = randomized(config).to(setting.device).eval()
    count = setting.count(_BATCH, 2)
    sampler = LatentSampler(model, chain(num_sampling_steps=2, cfg_scale=1.5, precision=precision), 1000)
    labels = [i % config.num_classes for i in range(count)]
    trace = traced(lambda: sampler(labels, 0, range(count)), setting.device)
    name = f"{config.name} sampling {precision}"
    yield from _attention_rows(name, trace)
    yield figure(f"{name}: kernels", sum(trace.kernels.values()), "2 steps", _names(trace.kernels))


def _attention_rows(name: str, trace: Trace) -> Iterator[Measure]:
    fused = trace.fused()
    yield at_least(f"{name}: fused attention", sum(fused.values()), 1, note=_names(fused))
    yield at_most(f"{name}: softmax with stored scores", trace.softmaxes(), 0)


def _names(counts: Counter[str]) -> str:
    """The most frequent names."""
    return ", ".join(f"{count} {name[:60]}" for name, count in counts.most_common(_SHOWN))
