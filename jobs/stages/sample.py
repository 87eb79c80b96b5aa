"""sample: draw labelled images from a checkpoint's EMA weights and keep their features, in units of fixed size.

Label and noise of sample i are functions of (seed, i): neither the number of workers nor the order of units moves a
result. Each unit is one file, so a killed run resumes where it was. Repeat r has the samples of seed + r.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.config import SampleConfig
from edt_core.errors import UserError
from edt_core.evaluation.extractors import EXTRACTORS
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, Source
from edt_core.store.layout import FEATURE_UNIT
from jobs.runtime.cluster import device_name, require, use_threads
from jobs.runtime.pool import pooled
from jobs.stages import autoencoder, extractors
from jobs.stages.stage import Stage

FEATURE_UNITS = FEATURE_UNIT.replace("{:05d}", "*")
_AT_ONCE = 2  # units of a worker under way: one is sampled while the one before is decoded and its features extracted


class Unit(NamedTuple):
    """The samples of one unit of work: which repeat they are of, and their indices in it, int64 [n]."""

    repeat: int
    indices: NDArray[np.int64]


def unit_of(config: SampleConfig, number: int) -> Unit:
    """Unit `number` of all repeats, which are laid end to end."""
    repeat, place = divmod(number, units_per_repeat(config))
    first = place * config.unit_size
    return Unit(repeat, np.arange(first, min(first + config.unit_size, config.num_samples)))


def units_per_repeat(config: SampleConfig) -> int:
    """Units of `unit_size` samples that make `num_samples`; the last one may be smaller."""
    return -(-config.num_samples // config.unit_size)


class Sampler:
    """Loads every network once, then makes one unit after the other; two at once, a stage each."""

    def __init__(self, config: SampleConfig, inputs: Mapping[str, Artifact | Source], out: ArtifactWriter) -> None:
        import torch

        from edt_core.autoencoders.autoencoder import load_autoencoder
        from edt_core.precision import use_precision
        from edt_core.sampling.sampler import LatentSampler

        use_threads(config.num_cpus_per_worker)
        use_precision("fp32")
        self.config, self.out = config, out
        self.device = device_name(config.num_gpus_per_worker)
        checkpoint = artifact(inputs, "checkpoint")
        model = averaged_model(checkpoint, self.device)
        guide = averaged_model(artifact(inputs, "guide"), self.device) if "guide" in inputs else None
        self.num_classes: int = model.config.num_classes
        self.class_counts = checkpoint.counts.get("class_counts")
        self.latents = LatentSampler(model, config, checkpoint.manifest.config["num_timesteps"], guide)
        self.autoencoder = load_autoencoder(artifact(inputs, "autoencoder").directory(autoencoder.FOLDER), self.device)
        self.extractors = {
            space: extractors.load(space, inputs[space], self.device) for space in extractors.spaces_of(inputs)
        }
        self._sampling, self._finishing = threading.Lock(), threading.Lock()
        # On a GPU a stream beside the one that samples: the two do not wait for each other.
        self._stream = torch.cuda.Stream() if self.device == "cuda" else None

    def work(self, number: int) -> int:
        """Make unit `number` unless it is there; returns its number of samples."""
        from safetensors.numpy import save

        name, unit = FEATURE_UNIT.format(number), unit_of(self.config, number)
        if self.out.recover(name) is None:
            with self._sampling:
                labels, latents = self._draw(unit)
            with self._finishing:
                self.out.write_bytes(name, save(self._finished(unit, labels, latents)), len(unit.indices))
        return len(unit.indices)

    def _draw(self, unit: Unit) -> tuple[NDArray[np.int64], Any]:
        """Labels int64 [n] and latents [n, C, h, h] of a unit."""
        from edt_core.sampling.labels import sample_labels

        seed, policy = self.config.seed + unit.repeat, self.config.label_policy
        indices = unit.indices.tolist()
        labels = sample_labels(policy, seed, indices, self.num_classes, self.class_counts)
        return labels, self.latents(labels, seed, indices)

    def _finished(self, unit: Unit, labels: NDArray[np.int64], latents: Any) -> dict[str, NDArray[Any]]:
        """The tensors of a unit's file: what the samples are, their features, and the first ones' pixels."""
        import torch

        from edt_core.autoencoders.autoencoder import decode_to_pixels

        with torch.cuda.stream(self._stream):  # does nothing where there is none
            pixels = decode_to_pixels(self.autoencoder, latents)
            found = {space: extract(pixels) for space, extract in self.extractors.items()}
        keep = self.config.keep_images
        kept = pixels if keep == "all" else pixels[unit.indices < keep]
        return {
            "indices": unit.indices,
            "seeds": np.full_like(unit.indices, self.config.seed + unit.repeat),
            "labels": labels,
            **{f"{space}.{name}": value for space, values in found.items() for name, value in values.items()},
            **({"images": kept} if len(kept) else {}),
        }


def artifact(inputs: Mapping[str, Artifact | Source], role: str) -> Artifact:
    """The artifact that fills a role which only an artifact can fill."""
    item = inputs[role]
    assert isinstance(item, Artifact), role
    return item


def averaged_model(checkpoint: Artifact, device: str) -> Any:
    """The EMA model of a checkpoint artifact, in evaluation mode."""
    from edt_core.training.checkpoint import ema_model

    return ema_model(checkpoint.directory(checkpoint.counts["final"]), device)


def sample_features(
    config: SampleConfig, inputs: Mapping[str, Artifact | Source], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Sample from `inputs["checkpoint"]` and keep what each extractor among the inputs sees in the samples.

    Decodes with `inputs["autoencoder"]`; a `guide` among the inputs is guided away from. Raises UserError where the
    inputs do not fit each other or the configuration, and for a class prior that the checkpoint does not have.
    """
    from edt_core.models import ModelConfig
    from edt_core.sampling.sampler import resolved_amm_blocks

    check(config, inputs)
    units = config.repeats * units_per_repeat(config)
    total, done = config.repeats * config.num_samples, 0
    resources: dict[str, Any] = {"num_cpus": config.num_cpus_per_worker, "num_gpus": config.num_gpus_per_worker}
    require("sample", CPU=config.num_cpus_per_worker, GPU=config.num_gpus_per_worker)
    work = pooled(Sampler, config.num_workers, range(units), config, dict(inputs), out, depth=_AT_ONCE, **resources)
    for _, count in work:
        done += count
        progress.update(done, total, "samples")
    checkpoint = artifact(inputs, "checkpoint")
    model = ModelConfig.from_dict(model_config_of(checkpoint))
    return {
        "samples": done,
        "units": units,
        "checkpoint_steps": checkpoint.counts["steps"],
        "model": checkpoint.counts["model"],
        **model.objective_record(),
        "extractors": extractors.digests_of(inputs),
        "autoencoder_digest": artifact(inputs, "autoencoder").manifest.digest,
        "guide_digest": artifact(inputs, "guide").manifest.digest if "guide" in inputs else None,
        "image_size": model.image_size,
        "amm_blocks": list(resolved_amm_blocks(config, model)),
        "device": device_name(config.num_gpus_per_worker),
    }


def check(config: SampleConfig, inputs: Mapping[str, Artifact | Source]) -> None:
    """Refuse, before any worker is started, what would be refused in each of them."""
    from edt_core.models import ModelConfig
    from edt_core.sampling.labels import sample_labels
    from edt_core.sampling.sampler import resolved_amm_blocks

    checkpoint = artifact(inputs, "checkpoint")
    check_autoencoder(inputs)
    if not extractors.spaces_of(inputs) and config.keep_images != "all":
        raise UserError(
            f"there is no network of features: give at least one of {', '.join(EXTRACTORS)}, or keep_images=all to "
            "draw samples for other tools alone"
        )
    model = ModelConfig.from_dict(model_config_of(checkpoint))
    replace(model, amm_blocks=resolved_amm_blocks(config, model))  # refuses blocks that the model does not have
    sample_labels(config.label_policy, config.seed, [0], model.num_classes, checkpoint.counts.get("class_counts"))


def check_autoencoder(inputs: Mapping[str, Artifact | Source]) -> None:
    """Raise UserError unless the latents that were trained on come from the very autoencoder that will decode.

    An autoencoder that was lost and fitted again has its old fingerprint but may have other weights. A model that was
    brought from elsewhere does not know its autoencoder.
    """
    trained_with = artifact(inputs, "checkpoint").counts["autoencoder_digest"]
    here = artifact(inputs, "autoencoder").manifest.digest
    if trained_with not in (here, None):
        raise UserError(
            f"the checkpoint was trained on latents of autoencoder {trained_with[:12]}, but this one is {here[:12]}: "
            "another, or rebuilt with other weights; give the one of the training, or remove the manifests of "
            "latents and checkpoint to rebuild them"
        )
    autoencoder.check_checkpoint_scale(artifact(inputs, "checkpoint"), artifact(inputs, "autoencoder"))


def model_config_of(checkpoint: Artifact) -> dict[str, Any]:
    """The ModelConfig of a checkpoint artifact as plain values."""
    from edt_core.store.layout import MODEL_CONFIG

    values: dict[str, Any] = checkpoint.read_json(f"{checkpoint.counts['final']}/{MODEL_CONFIG}")
    return values


def load_units(features: Artifact, repeat: int = 0) -> dict[str, NDArray[Any]]:
    """Every unit of a repeat, joined in order of sample: `indices`, `labels`, `<space>.features`, `images` and so on.

    Raises UserError unless samples 0..n-1 of that repeat's seed are there once each, in order; ManifestError where a
    file is not what was written.
    """
    config = SampleConfig.model_validate(features.manifest.config)
    units = list(_units(features, config, repeat))
    names = dict.fromkeys(name for unit in units for name in unit)
    joined = {name: np.concatenate([unit[name] for unit in units if name in unit]) for name in names}
    seeds = np.full(config.num_samples, config.seed + repeat)
    whole = bool(units) and np.array_equal(joined["indices"], np.arange(config.num_samples))
    if not whole or not np.array_equal(joined["seeds"], seeds):
        raise UserError(
            f"{features.folder.uri} does not hold samples 0..{config.num_samples - 1} of seed {config.seed + repeat} "
            "once each and in order; run sample again"
        )
    return joined


def _units(features: Artifact, config: SampleConfig, repeat: int) -> Iterator[dict[str, NDArray[Any]]]:
    first = repeat * units_per_repeat(config)
    wanted = {FEATURE_UNIT.format(first + number) for number in range(units_per_repeat(config))}
    features.verify_once(FEATURE_UNITS)
    for entry in features.entries(FEATURE_UNITS):
        if entry.path in wanted:
            yield load_tensors(features.path(entry.path), "numpy")


STAGE = Stage(
    "sample",
    "features",
    2,
    SampleConfig,
    sample_features,
    roles=("checkpoint", "autoencoder"),
    optional=(*EXTRACTORS, "guide"),
)
