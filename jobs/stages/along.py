"""along: a small evaluation of each checkpoint that a training kept, by one protocol: the metric as a curve.

The samples of every checkpoint have the same labels and noise, so that differences between points are differences of
the weights. Each unit of samples is a file, so a killed run resumes after its finished units, and this step after those
that were made while the training ran (`jobs.stages.training.follow`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from edt_core.errors import UserError
from edt_core.evaluation.config import AlongConfig, EvaluateConfig
from edt_core.evaluation.extractors import EXTRACTORS
from edt_core.evaluation.references import load_reference
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, Source, sha256_json
from edt_core.store.cache import local_copy
from edt_core.store.layout import ALONG_NAME, EMA_WEIGHTS, FEATURE_UNIT
from jobs.runtime.cluster import require, use_threads
from jobs.runtime.devices import kind_of_devices
from jobs.runtime.pool import pooled
from jobs.stages import extractors, sample
from jobs.stages.evaluate import check_spaces, over_repeats, protocol_of, repeat_metrics
from jobs.stages.stage import DEVICE, Stage

_UNITS = "units"  # folder of the units' files, a folder a step; removed at the end
_EARLY = ".early"  # in an attempt that holds units which were made during the training; removed at the end


class _Sampler:
    """Makes units of samples of one checkpoint after the other; the networks are loaded again for each checkpoint."""

    def __init__(self, config: AlongConfig, inputs: Mapping[str, Artifact | Source], out: ArtifactWriter) -> None:
        self.config, self.inputs, self.out = config, inputs, out
        self.step = -1
        self.sampler: sample.Sampler | None = None

    def work(self, item: tuple[int, int]) -> tuple[int, str]:
        """Make unit (step, number); return its number of samples, and this worker's device."""
        step, number = item
        if self.sampler is None or step != self.step:
            self.sampler = None  # before the next networks are loaded
            folder = _folder(self.inputs, step)
            self.sampler = sample.Sampler(self.config.sampling, self.inputs, self.out, step, folder)
            self.step = step
        return self.sampler.work(number)


def along(
    config: AlongConfig, inputs: Mapping[str, Artifact | Source], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Measure the kept checkpoints of `inputs["checkpoint"]` at multiples of `every` steps, and the last one.

    Raises UserError if there is none, and as `sample` and `evaluate` for inputs that do not match.
    """
    steps = check(config, inputs, progress)
    total, done = len(steps) * config.repeats * config.num_samples, 0
    require("along", CPU=config.num_cpus_per_worker, GPU=config.num_gpus_per_worker)
    devices = set[str]()
    for count, device in sampled(config, inputs, steps, out, config.num_workers):
        done += count
        devices.add(device)
        progress.update(done, total, "samples")
    points = rows(config, steps, inputs, out)
    for row in points:
        progress.metrics({name: value for name, value in row.items() if name != "step"}, int(row["step"]))
    reference = sample.artifact(inputs, "reference")
    protocol = protocol_of(config.sampling, config.measured, _facts(inputs), reference)
    out.write_json(ALONG_NAME, {"points": points, "protocol": protocol})
    out.discard(_UNITS)
    _remove_early(out)
    return {"points": len(points), "samples": done, "steps": steps, DEVICE: kind_of_devices(devices)}


def sampled(
    config: AlongConfig,
    inputs: Mapping[str, Artifact | Source],
    steps: Sequence[int],
    out: ArtifactWriter,
    workers: int,
) -> Iterator[tuple[int, str]]:
    """Make the units of samples of these steps; the number of samples of each, and the device that made it."""
    units = config.repeats * sample.units_per_repeat(config)
    items = [(step, number) for step in steps for number in range(units)]
    resources: dict[str, Any] = {"num_cpus": config.num_cpus_per_worker, "num_gpus": config.num_gpus_per_worker}
    for _, made in pooled(_Sampler, workers, items, config, dict(inputs), out, **resources):
        yield made


def rows(
    config: AlongConfig, steps: Sequence[int], inputs: Mapping[str, Artifact | Source], out: ArtifactWriter
) -> list[dict[str, float]]:
    """The metrics of each step, with "step", from its units; means over the repeats with `<metric>_std`."""
    task = ray.remote(num_cpus=config.num_cpus_per_worker)(_rows)
    measured: list[dict[str, float]] = ray.get(task.remote(config, steps, dict(inputs), out))
    return measured


def begun_early(out: ArtifactWriter) -> ArtifactWriter:
    """An attempt for units that are made during the training; the step takes them over and removes it."""
    out.data.write_bytes(_EARLY, b"")
    return out


def _remove_early(out: ArtifactWriter) -> None:
    for attempt in out.previous:
        if out.folder.child(attempt).exists(_EARLY):
            out.folder.remove(attempt)


def check(config: AlongConfig, inputs: Mapping[str, Artifact | Source], progress: Progress) -> list[int]:
    """The steps to measure. Raises UserError if there are none, or the inputs do not match each other.

    A checkpoint may be missing that was damaged, or that a shorter training had which this one continues: a warning.
    """
    if config.every is None:
        raise UserError("along.every is null, so there is nothing to measure; set the number of steps between points")
    checkpoint = sample.artifact(inputs, "checkpoint")
    steps = kept_steps(checkpoint, config.every)
    if missing := [step for step in range(config.every, steps[-1], config.every) if step not in steps]:
        lacks = (
            f"{checkpoint.folder.uri} did not keep {len(missing)} of the checkpoints at multiples of {config.every} "
            f"steps (the first is that of step {missing[0]})"
        )
        if len(steps) == 1:
            raise UserError(f"{lacks}; train with train.keep_every={config.every}")
        progress.warn(f"{lacks}; the curve is made without them")
    if len(steps) > 1 and checkpoint.manifest.config.get("trainable", "all") != "all":
        raise UserError(
            f"{checkpoint.folder.uri} trained only some parameters (trainable "
            f"{checkpoint.manifest.config['trainable']}), and only its last model has all: evaluate that one"
        )
    check_networks(config, inputs)
    return steps


def check_networks(config: AlongConfig, inputs: Mapping[str, Artifact | Source]) -> None:
    """Raise UserError unless the inputs match each other and the protocol."""
    sample.check(config.sampling, inputs)
    check_spaces(_facts(inputs), sample.artifact(inputs, "reference"), "the samples")


def kept_steps(checkpoint: Artifact, every: int) -> list[int]:
    """The steps of a training's kept checkpoints at multiples of `every`, and its last step, in order."""
    kept = {int(name.rpartition("-")[2]) for name in checkpoint.counts["checkpoints"]}
    return sorted({step for step in kept if step and step % every == 0} | {int(checkpoint.counts["steps"])})


def _facts(inputs: Mapping[str, Artifact | Source]) -> dict[str, Any]:
    """What a features artifact of these inputs would record of its networks."""
    from edt_core.models import ModelConfig

    model = ModelConfig.from_dict(sample.model_config_of(sample.artifact(inputs, "checkpoint")))
    return {
        "guide_digest": None,
        "extractors": extractors.digests_of(inputs),
        "autoencoder_digest": sample.artifact(inputs, "autoencoder").manifest.digest,
        "image_size": model.image_size,
    }


def _folder(inputs: Mapping[str, Artifact | Source], step: int) -> str:
    """Where the units of a step's checkpoint are: samples of other weights or networks are not taken for them."""
    checkpoint = sample.artifact(inputs, "checkpoint")
    (weights,) = checkpoint.entries(f"{sample.folder_of(checkpoint, step)}/{EMA_WEIGHTS}")
    autoencoder = sample.artifact(inputs, "autoencoder").manifest.digest
    identity = sha256_json([weights.sha256, autoencoder, extractors.digests_of(inputs)])
    return f"{_UNITS}/{step:08d}-{identity[:12]}/"


def _rows(
    config: AlongConfig, steps: Sequence[int], inputs: Mapping[str, Artifact | Source], out: ArtifactWriter
) -> list[dict[str, float]]:
    use_threads(config.num_cpus_per_worker)
    measured: EvaluateConfig = config.measured
    reference = sample.artifact(inputs, "reference")
    real = {space: load_reference(reference, space) for space in extractors.spaces_of(inputs)}
    found = []
    for step in steps:
        folder = _folder(inputs, step)
        sets = [_samples(config, folder, number, out) for number in range(config.repeats)]
        repeats = [repeat_metrics(measured, samples, real) for samples in sets]
        found.append({"step": float(step), **(repeats[0] if len(repeats) == 1 else over_repeats(repeats))})
    return found


def _samples(config: AlongConfig, folder: str, repeat: int, out: ArtifactWriter) -> dict[str, NDArray[Any]]:
    """Features and labels of all samples of a repeat. Raises UserError unless each sample is there once."""
    number = sample.units_per_repeat(config)
    names = [f"{folder}{FEATURE_UNIT.format(repeat * number + unit)}" for unit in range(number)]
    units = [load_tensors(local_copy(out.data, name), "numpy") for name in names]
    joined = {key: np.concatenate([unit[key] for unit in units]) for key in units[0] if key != "images"}
    if not np.array_equal(joined["indices"], np.arange(config.num_samples)):
        raise UserError(f"the samples in {folder} are not complete; remove {out.data.uri} and run again")
    return joined


STAGE = Stage(
    "along",
    "along",
    1,
    AlongConfig,
    along,
    roles=("checkpoint", "autoencoder", "reference"),
    optional=EXTRACTORS,
)
