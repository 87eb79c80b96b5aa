"""The `TrainContext` of a training loop in a Ray Train worker."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

from edt_core.config import TrainConfig
from edt_core.progress import Progress
from edt_core.store.artifact import ArtifactWriter
from edt_core.training.checkpoint import checkpoint_name
from edt_core.training.context import Request
from edt_core.training.ranks import Ranks
from edt_core.training.store import CheckpointStore
from edt_core.training.trainer import COMPILE_SECONDS
from edt_core.training.validation.overfitting import HELD_OUT_LOSS
from jobs.runtime.devices import check_gpu
from jobs.stages import autoencoder
from jobs.stages.training.follow import has_enough

_LOOK_EVERY_S = 2.0
CLOCK = ".device_time.json"


class DeviceClock:
    """Seconds that devices were in use for a training, summed over all workers and attempts.

    They are written with each row of the history: the time of a killed worker after its last row is lost.
    """

    def __init__(self, out: ArtifactWriter, workers: int) -> None:
        self._out, self._workers = out, workers
        self._before, self._started = device_seconds(out), time.monotonic()

    def write(self) -> None:
        seconds = self._before + self._workers * (time.monotonic() - self._started)
        with suppress(Exception):  # a failed write must not end training; a full disk fails its checkpoints
            write_seconds(self._out, seconds)


def device_seconds(out: ArtifactWriter) -> float:
    """The most seconds on a clock of this attempt or an earlier one: each counts on from the one before it.

    The names of attempts do not say which is the last one, because machines whose clocks differ give them.
    """
    seconds = [0.0]
    for attempt in (out.attempt, *out.previous):
        with suppress(FileNotFoundError):
            seconds.append(float(json.loads(out.folder.child(attempt).read_bytes(CLOCK))))
    return max(seconds)


def remove_clock(out: ArtifactWriter) -> None:
    """Remove the clock from a finished attempt."""
    out.data.remove(CLOCK)


def write_seconds(out: ArtifactWriter, seconds: float) -> None:
    """Set the clock of this attempt, which counts on from there."""
    out.data.write_bytes(CLOCK, json.dumps(seconds).encode())


class RayContext:
    """A `TrainContext` in a Ray Train worker. Checkpoints are written directly into the unfinished artifact.

    Ray Train does not know about them: it does not write its own record atomically, and a run with a truncated record
    cannot be restarted. A restarted worker uses our checkpoint store, which trusts only digests.
    """

    def __init__(self, config: TrainConfig, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress) -> None:
        import ray.train
        import ray.train.torch

        worker = ray.train.get_context()
        device = ray.train.torch.get_device()
        if config.use_gpu and device.type != "cuda":  # Ray Train would train on the CPU
            check_gpu("train.use_gpu is true")
        self.ranks = Ranks(worker.get_world_rank(), worker.get_world_size(), device)
        self.config, self.inputs, self.progress = config, inputs, progress
        self.store = CheckpointStore(out, config.num_to_keep, progress.warn, self._report_checkpoints)
        self._clock = DeviceClock(out, worker.get_world_size())
        self._last_checkpoint = self._held_out = self._note = ""  # a note is shown once
        self._polled_at = time.monotonic()
        self._saved_preemption: Any = None  # the last one that a checkpoint was written for

    def step_done(self, step: int, total_steps: int, loss: float) -> None:
        detail = f"loss {loss:.4f}{self._held_out}{self._last_checkpoint}{self._note}"
        self.progress.update(step, total_steps, "steps", detail=detail)
        self._note = ""

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        self._clock.write()
        if COMPILE_SECONDS in metrics:
            self._note = f", compiled in {metrics[COMPILE_SECONDS]:.0f} s"
        if HELD_OUT_LOSS in metrics:
            self._held_out = f", held out {metrics[HELD_OUT_LOSS]:.4f}"
        self.progress.metrics({name: value for name, value in metrics.items() if name != "step"}, step)

    def warn(self, message: str) -> None:
        self.progress.warn(message)

    def preview(self, weights: Mapping[str, Any], step: int) -> None:
        """Report a sample grid. An error becomes a warning: a grid must not end training."""
        if "autoencoder" not in self.inputs:
            return
        try:
            self.progress.image("samples", self._preview.png(weights), step)
        except Exception as error:
            self.warn(f"no sample grid at step {step}: {error}")

    @cached_property
    def _preview(self) -> Any:
        from edt_core.training.preview import Preview

        folder = self.inputs["autoencoder"].directory(autoencoder.FOLDER)
        counts = self.inputs["latents"].counts.get("class_counts")
        return Preview(self.inputs["model_config"], self.config.num_timesteps, folder, self.ranks.device, counts)

    def has_news(self) -> bool:
        return self.ranks.rank == 0 and time.monotonic() - self._polled_at > _LOOK_EVERY_S

    def look(self) -> Request:
        """The request to stop, or to save because a node of this training is about to be removed."""
        import ray.train

        preemption = ray.train.get_preemption_info()
        request = Request.NOTHING
        if preemption is not None and preemption != self._saved_preemption:
            self._saved_preemption, request = preemption, Request.SAVE
        if self.ranks.rank == 0:
            if self.config.patience is not None and has_enough(self.store.out):
                request = Request.ENOUGH
            if self.progress.stopping():
                request = Request.STOP
        self._polled_at = time.monotonic()
        return Request(self.ranks.agree(request.value))

    def _report_checkpoints(self, store: CheckpointStore) -> None:
        manifests = store.manifests()
        self._last_checkpoint = f", checkpoint {max(manifests)}"
        places = {step: store.folder.child(checkpoint_name(step)).uri for step in manifests}
        self.progress.checkpoints({step: (places[step], manifest.seal) for step, manifest in manifests.items()})
