"""The cost of each step of a run: time, throughput, operations, and size in the store."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edt_core.config import SampleConfig
from edt_core.diffusion import objective_of
from edt_core.store.artifact import Artifact

# kind -> the unit of its work, and the field of the manifest with the number: "counts.<name>" or "config.<name>"
_WORK = {
    "images": ("images", "counts", "images"),
    "autoencoder": ("steps", "config", "steps"),
    "latents": ("images", "counts", "images"),
    "classifier": ("steps", "config", "steps"),
    "reference": ("images", "counts", "images"),
    "checkpoint": ("images", "counts", "images_seen"),
    "features": ("samples", "counts", "samples"),
    "along": ("samples", "counts", "samples"),
}


@dataclass(frozen=True)
class StepCost:
    """One step. A value is None if it is unknown or does not apply.

    seconds: from start to commit, including the wait for cores. work: number of `unit`s. flops: of the diffusion
    transformer. device_seconds: sum over all training workers. bytes: of the files that it wrote.
    """

    step: str
    seconds: float
    work: int | None
    unit: str
    flops: int | None
    device_seconds: float | None
    bytes: int

    @property
    def rate(self) -> float | None:
        """Work per second."""
        return self.work / self.seconds if self.work and self.seconds else None


def step_cost(step: str, artifact: Artifact, macs: int) -> StepCost:
    """The cost of the step that made an artifact. `macs`: multiply-accumulates of a forward pass for one image."""
    manifest = artifact.manifest
    unit, place, name = _WORK.get(manifest.kind, ("", "counts", ""))
    work = (manifest.config if place == "config" else manifest.counts).get(name)
    if manifest.kind == "autoencoder" and manifest.counts.get("source") != "fitted":
        work = None
    hours = manifest.counts.get("device_hours")
    return StepCost(
        step=step,
        seconds=manifest.duration_s,
        work=work or None,
        unit=unit,
        flops=_FLOPS.get(manifest.kind, lambda *_: None)(manifest.config, manifest.counts, macs),
        device_seconds=hours * 3600 if hours else None,
        bytes=sum(entry.bytes for entry in manifest.files),
    )


def _training(config: Mapping[str, Any], counts: Mapping[str, Any], macs: int) -> int | None:
    return counts.get("training_flops") or None


def _sampling(config: Mapping[str, Any], counts: Mapping[str, Any], macs: int) -> int | None:
    """2 FLOPs per multiply-accumulate; the forward passes of the sampler's steps, with guidance those of the guide too.

    None if guidance is limited to an interval, and in records of versions that did not count a guide: the number of
    passes is not recorded then.
    """
    chain = SampleConfig.model_validate(config)
    guide_macs = counts.get("guide_macs") if counts.get("guide_digest") else macs
    if guide_macs is None or chain.guidance_interval is not None:
        return None
    calls = objective_of(counts.get("objective", "epsilon")).calls(chain.sampler, chain.num_sampling_steps)
    return 2 * (macs + (0 if chain.cfg_scale == 1 else guide_macs)) * calls * int(counts["samples"])


_FLOPS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], int], int | None]] = {
    "checkpoint": _training,
    "features": _sampling,
}
