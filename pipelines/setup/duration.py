"""How long steps will take: at the pace of earlier artifacts in the store, or of a training that is timed here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edt_core.config import Section, TrainConfig
from edt_core.models import ModelConfig
from edt_core.store.manifest import Manifest
from pipelines.setup.hardware import Hardware

_LEAST, _MOST = 0.2, 5.0  # the work relative to that of an earlier artifact: further off, start-up times decide
_LIMIT_S = 5.0  # for the timed steps
_MOST_STEPS = 10
_SHARE = 0.2  # of the rate of a large matrix product that a training reaches at least on a machine without other load
_ALIKE = ("images", "latents", "reference")  # kinds whose work is that of images of one size
_UNITS = ((86400 * 2, 86400, "days"), (7200, 3600, "h"), (120, 60, "min"))


@dataclass(frozen=True)
class Work:
    """What a step will process: its configuration, the images of the source, and what else decides its pace."""

    kind: str
    config: Section
    images: int | None = None
    image_size: int | None = None
    model: str | None = None

    def amount(self) -> float | None:
        """In the units of `_amount`; None if it is unknown."""
        if isinstance(self.config, TrainConfig) and self.images is not None:
            return float(self.config.total_steps(self.images) * self.config.global_batch_size)
        counts = {} if self.images is None else {"images": self.images}
        return _amount(self.kind, self.config.model_dump(), counts)


def expected_seconds(work: Work, manifests: Iterable[Manifest]) -> float | None:
    """The seconds of a step at the pace of the first artifact of its kind, of `manifests`, that is like it.

    None if there is none: of the same model and image size, computed as a whole, and with work of the same magnitude.
    """
    now = work.amount()
    for manifest in manifests:
        before = _amount(manifest.kind, manifest.config, manifest.counts)
        if now is None or before is None or manifest.reused or not _is_like(work, manifest):
            continue
        if now == before:
            return manifest.duration_s
        if before > 0 and _LEAST <= now / before <= _MOST:
            return manifest.duration_s * now / before
    return None


def _is_like(work: Work, manifest: Manifest) -> bool:
    if work.kind in ("checkpoint", "features"):
        return bool(manifest.counts.get("model") == work.model)
    return work.kind not in _ALIKE or manifest.counts.get("image_size") == work.image_size


def _amount(kind: str, config: Mapping[str, Any], counts: Mapping[str, Any]) -> float | None:
    """Images, steps, or steps of samples; 1 for steps that take equally long; None if it is unknown."""
    if kind in _ALIKE:
        return counts.get("images")
    if kind == "checkpoint":
        return counts.get("images_seen")
    if kind in ("autoencoder", "classifier"):
        return 1.0 if config.get("pretrained") else config.get("steps")
    if kind == "features":
        return config["num_samples"] * config["num_sampling_steps"] * config.get("repeats", 1)
    return None if kind == "along" else 1.0  # the points of a curve are not known before its training


@dataclass(frozen=True)
class Pace:
    """The speed of one worker's training: images per second, measured over so many micro-batches."""

    images_per_s: float
    steps: int
    micro_batch: int


def timed_pace(config: TrainConfig, model_config: ModelConfig, memory: int, machine: Hardware) -> Pace | str:
    """Time a few training steps of one worker on this machine, in about 5 seconds; or the reason why not.

    memory: bytes that a worker needs. The inputs are random, and neither latents are read nor losses exchanged.
    """
    import torch

    from edt_core.training.meter import matmul_rate
    from edt_core.training.start.trainable import step_flops

    if config.use_gpu and not machine.gpus:
        return "it needs a GPU, and this machine has none"
    device = torch.device("cuda" if config.use_gpu else "cpu")
    free = machine.gpu_memory if config.use_gpu else machine.memory
    if free and 2 * memory > free:
        return "it may not fit in this machine's memory"
    per_image = step_flops(config, model_config) / (_SHARE * matmul_rate(device, config.precision))
    if per_image * 2 > _LIMIT_S:
        return f"a step would take longer than {_LIMIT_S:g} s on this machine"
    micro_batch = max(1, min(config.micro_batch(), int(_LIMIT_S / 2 / per_image)))
    return _time(config, model_config, device, micro_batch)


def _time(config: TrainConfig, model_config: ModelConfig, device: Any, micro_batch: int) -> Pace:
    import time

    import torch

    from edt_core.acceptance.subjects import step_inputs
    from edt_core.training.ranks import Ranks
    from jobs.benchmark.train import BareStep

    one = {"global_batch_size": micro_batch, "micro_batch_size": micro_batch, "num_workers": 1, "compile": False}
    small = config.model_copy(update=one)
    step = BareStep(small, model_config, step_inputs(small, model_config, device), Ranks(device=device))
    until = time.perf_counter() + _LIMIT_S
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) <= _MOST_STEPS and time.perf_counter() < until):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    counted = sorted(seconds[1:])  # the first one warms up
    return Pace(micro_batch / counted[len(counted) // 2], len(counted), micro_batch)


def training_seconds(config: TrainConfig, images: int, pace: Pace, machine: Hardware) -> float:
    """Seconds of a whole training on this machine. Workers share its CPUs, and each takes a GPU of its own."""
    workers = min(config.worker_range[1], len(machine.gpus)) if config.use_gpu else 1
    seconds = config.total_steps(images) * config.global_batch_size / (pace.images_per_s * workers)
    return seconds if config.max_hours is None else min(seconds, config.max_hours * 3600)


def about(seconds: float) -> str:
    """`40 s`, `25 min`, `3.5 h`, `12 days`: two digits, for estimates."""
    for least, size, unit in _UNITS:
        if seconds >= least:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}".replace(".0 ", " ")
    return f"{max(seconds, 1):.0f} s"
