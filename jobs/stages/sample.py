"""sample: draw labelled images from a checkpoint's EMA weights and store their features, in units of fixed size.

Label and noise of sample i are functions of (seed, i): the number of workers and the order of units do not change the
results. Each unit is one file, so a killed run resumes after its finished units. Repeat r has the samples of seed + r.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.config import SampleConfig
from edt_core.errors import UserError
from edt_core.evaluation.extractors import EXTRACTORS
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, Source
from edt_core.store.layout import CHECKPOINTS, EMA_WEIGHTS, FEATURE_UNIT, MODEL_CONFIG, TRAIN_STATE
from jobs.runtime.cluster import require, use_threads
from jobs.runtime.devices import device_name, kind_of_devices
from jobs.runtime.pool import pooled
from jobs.stages import autoencoder, extractors
from jobs.stages.classifier import FOLDER as CLASSIFIER_FOLDER
from jobs.stages.stage import DEVICE, Stage

if TYPE_CHECKING:
    from edt_core.models import ModelConfig
    from edt_core.sampling.latent_classifier import LatentClassifier

FEATURE_UNITS = FEATURE_UNIT.replace("{:05d}", "*")
DECODED_AT_ONCE = "decoded_at_once"  # images; among the counts of features
_OF_A_MODEL = (MODEL_CONFIG, EMA_WEIGHTS, TRAIN_STATE)  # files of a checkpoint that its averaged model needs
_AT_ONCE = 2  # units of a worker: it samples one while it decodes the previous one and extracts features


class Unit(NamedTuple):
    """The samples of one unit of work: their repeat, and their indices in it, int64 [n]."""

    repeat: int
    indices: NDArray[np.int64]


def unit_of(config: SampleConfig, number: int) -> Unit:
    """Unit `number`, counted through all repeats."""
    repeat, unit = divmod(number, units_per_repeat(config))
    first = unit * config.unit_size
    return Unit(repeat, np.arange(first, min(first + config.unit_size, config.num_samples)))


def units_per_repeat(config: SampleConfig) -> int:
    """Units of `unit_size` samples that make `num_samples`; the last one may be smaller."""
    return -(-config.num_samples // config.unit_size)


class Sampler:
    """Loads every network once, then makes units, two at a time: one samples while the other decodes.

    `step`: of the checkpoint to sample from, None for the last. `folder`: beginning of the names of the units' files in
    `out`, such as "units/".
    """

    def __init__(
        self,
        config: SampleConfig,
        inputs: Mapping[str, Artifact | Source],
        out: ArtifactWriter,
        step: int | None = None,
        folder: str = "",
    ) -> None:
        import torch

        from edt_core.autoencoders.autoencoder import load_autoencoder
        from edt_core.precision import use_precision
        from edt_core.sampling.sampler import LatentSampler
        from edt_core.training.speed.compiled import compile_parts

        use_threads(config.num_cpus_per_worker)
        use_precision("fp32")
        self.config, self.out, self.folder = config, out, folder
        self.device = device_name(config.num_gpus_per_worker)
        checkpoint = artifact(inputs, "checkpoint")
        model = averaged_model(checkpoint, self.device, step)
        guide = averaged_model(artifact(inputs, "guide"), self.device) if "guide" in inputs else None
        if config.compile:
            for network in filter(None, (model, guide)):
                compile_parts(network)
        self._untried = config.compile
        self.num_classes: int = model.config.num_classes
        self.class_counts = checkpoint.counts.get("class_counts")
        self.autoencoder = load_autoencoder(artifact(inputs, "autoencoder").directory(autoencoder.FOLDER), self.device)
        classify = self._classify(inputs, model.config)
        timesteps = checkpoint.manifest.config["num_timesteps"]
        self.latents = LatentSampler(model, config, timesteps, guide, classify=classify)
        self.extractors = {
            space: extractors.load(space, inputs[space], self.device) for space in extractors.spaces_of(inputs)
        }
        self._sampling, self._finishing = threading.Lock(), threading.Lock()
        # On a GPU, a second stream for decoding: it and the sampling do not wait for each other.
        self._stream = torch.cuda.Stream() if self.device == "cuda" else None

    def _classify(self, inputs: Mapping[str, Artifact | Source], model: "ModelConfig") -> "LatentClassifier | None":
        """The classifier that chooses what samples are guided away from; None for a chain without one."""
        from edt_core.evaluation.extractors.classifier import Classifier
        from edt_core.sampling.latent_classifier import LatentClassifier

        if self.config.guidance_reference is None or "classifier" not in inputs:
            return None
        folder = artifact(inputs, "classifier").directory(CLASSIFIER_FOLDER)
        return LatentClassifier(self.autoencoder, Classifier.load(folder, self.device), model)

    def work(self, number: int) -> tuple[int, str]:
        """Make unit `number` unless its file exists; return its number of samples, and this worker's device."""
        from safetensors.numpy import save

        name, unit = self.folder + FEATURE_UNIT.format(number), unit_of(self.config, number)
        if self.out.recover(name) is None:
            with self._sampling:
                labels, latents = self._draw(unit)
            with self._finishing:
                self.out.write_bytes(name, save(self._tensors(unit, labels, latents)), len(unit.indices))
        return len(unit.indices), self.device

    def _draw(self, unit: Unit) -> tuple[NDArray[np.int64], Any]:
        """Labels int64 [n] and latents [n, C, h, h] of a unit."""
        from edt_core.sampling.labels import sample_labels

        seed, policy = self.config.seed + unit.repeat, self.config.label_policy
        indices = unit.indices.tolist()
        labels = sample_labels(policy, seed, indices, self.num_classes, self.class_counts)
        return labels, self._latents(labels, seed, indices)

    def _latents(self, labels: NDArray[np.int64], seed: int, indices: list[int]) -> Any:
        """Latents [n, C, h, h]. The first call compiles, and raises UserError if that fails."""
        import torch

        try:
            latents = self.latents(labels, seed, indices)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the compiler's are of many kinds, and those of its tools have no common one
            if not self._untried:
                raise
            from edt_core.training.speed.compiled import error_text

            raise UserError(
                f"the model could not be compiled ({error_text(error)}); set sample.compile=false, or mend the "
                "compiler (a GPU needs triton and a C compiler)"
            ) from error
        self._untried = False
        return latents

    def _tensors(self, unit: Unit, labels: NDArray[np.int64], latents: Any) -> dict[str, NDArray[Any]]:
        """The tensors of a unit's file: indices, labels, features, and the pixels of the first samples."""
        import torch

        from edt_core.autoencoders.autoencoder import decode_to_pixels

        with torch.cuda.stream(self._stream):  # does nothing without a stream
            pixels = decode_to_pixels(self.autoencoder, latents, self.latents.model.config)
            outputs = {space: extract(pixels) for space, extract in self.extractors.items()}
        limit = self.config.keep_images
        images = pixels if limit == "all" else pixels[unit.indices < limit]
        return {
            "indices": unit.indices,
            "seeds": np.full_like(unit.indices, self.config.seed + unit.repeat),
            "labels": labels,
            **{f"{space}.{name}": value for space, values in outputs.items() for name, value in values.items()},
            **({"images": images} if len(images) else {}),
        }


def artifact(inputs: Mapping[str, Artifact | Source], role: str) -> Artifact:
    """The input of a role that must be an artifact."""
    item = inputs[role]
    assert isinstance(item, Artifact), role
    return item


def averaged_model(checkpoint: Artifact, device: str, step: int | None = None) -> Any:
    """The EMA model of a checkpoint artifact, in evaluation mode: the last one, or that of a step, which is kept."""
    from edt_core.training.checkpoint import ema_model

    return ema_model(checkpoint.directory(folder_of(checkpoint, step), _OF_A_MODEL), device)


def folder_of(checkpoint: Artifact, step: int | None) -> str:
    """The folder of a step's checkpoint, which is kept, in a checkpoint artifact; the last one for None."""
    from edt_core.training.checkpoint import checkpoint_name

    if step is None or step == checkpoint.counts["steps"]:
        return str(checkpoint.counts["final"])
    return f"{CHECKPOINTS}/{checkpoint_name(step)}"


def sample_features(
    config: SampleConfig, inputs: Mapping[str, Artifact | Source], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Draw samples from a checkpoint and store the features of each feature network.

    Samples from `inputs["checkpoint"]`, decodes with `inputs["autoencoder"]`, and guides away from a `guide` among the
    inputs. Raises UserError if the inputs do not match each other or the configuration, and if the labels need class
    counts that the checkpoint does not have.
    """
    from edt_core.models import ModelConfig
    from edt_core.sampling.sampler import resolved_amm_blocks

    check(config, inputs)
    units = config.repeats * units_per_repeat(config)
    total, done = config.repeats * config.num_samples, 0
    resources: dict[str, Any] = {"num_cpus": config.num_cpus_per_worker, "num_gpus": config.num_gpus_per_worker}
    require("sample", CPU=config.num_cpus_per_worker, GPU=config.num_gpus_per_worker)
    work = pooled(Sampler, config.num_workers, range(units), config, dict(inputs), out, depth=_AT_ONCE, **resources)
    devices = set[str]()
    for _, (count, device) in work:
        done += count
        devices.add(device)
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
        **_guide_record(inputs),
        "image_size": model.image_size,
        "amm_blocks": list(resolved_amm_blocks(config, model)),
        **decode_record(config, model.image_size),
        **({"compiled": True} if config.compile else {}),
        DEVICE: kind_of_devices(devices),
    }


def _guide_record(inputs: Mapping[str, Artifact | Source]) -> dict[str, Any]:
    """What the counts say of the guide: its digest, None for no guide, and its multiply-accumulates."""
    if "guide" not in inputs:
        return {"guide_digest": None}
    guide = artifact(inputs, "guide")
    return {"guide_digest": guide.manifest.digest, "guide_macs": guide.counts.get("macs")}


def decode_record(config: SampleConfig, image_size: int) -> dict[str, int]:
    """How many images of a unit are decoded at once, for the counts; {} where the whole unit is, as in older records.

    Only the last bits of an image depend on it. It is not in the protocol of the metrics: no champion that was sampled
    before could be compared with a new version.
    """
    from edt_core.autoencoders.parts import images_per_call

    most = images_per_call(image_size)
    return {DECODED_AT_ONCE: most} if most < min(config.unit_size, config.num_samples) else {}


def check(config: SampleConfig, inputs: Mapping[str, Artifact | Source]) -> None:
    """Raise UserError for invalid inputs, before any worker starts."""
    from edt_core.diffusion import SamplerChoice, objective_of_model
    from edt_core.models import ModelConfig
    from edt_core.sampling.labels import sample_labels
    from edt_core.sampling.sampler import check_guidance, resolved_amm_blocks

    checkpoint = artifact(inputs, "checkpoint")
    check_autoencoder(inputs)
    if not extractors.spaces_of(inputs) and config.keep_images != "all":
        raise UserError(
            f"there is no feature network: pass at least one of {', '.join(EXTRACTORS)}, or set keep_images=all to "
            "draw samples only for other tools"
        )
    model = ModelConfig.from_dict(model_config_of(checkpoint))
    objective_of_model(model).check_sampler(SamplerChoice.of(config))
    objective_of_model(model).check_chain(config, model)
    replace(model, amm_blocks=resolved_amm_blocks(config, model))  # raises for blocks that the model does not have
    if config.guidance_reference == "confused" and "classifier" not in inputs:
        raise UserError(
            "guidance_reference is confused, but there is no classifier to confuse the samples; pass --classifier, or "
            "set guidance_reference=null"
        )
    check_guidance(config, model, checkpoint.manifest.config["num_timesteps"])
    if "guide" in inputs:
        _check_guide(config, checkpoint, artifact(inputs, "guide"), model)
    sample_labels(config.label_policy, config.seed, [0], model.num_classes, checkpoint.counts.get("class_counts"))


def _check_guide(config: SampleConfig, checkpoint: Artifact, guide: Artifact, model: "ModelConfig") -> None:
    """Raise UserError unless the checkpoint can be guided away from the guide by this chain."""
    from edt_core.diffusion import objective_of_model
    from edt_core.models import ModelConfig
    from edt_core.sampling.sampler import check_guide

    check_guide(config, model, ModelConfig.from_dict(model_config_of(guide)))
    own = checkpoint.manifest.config["num_timesteps"]
    other = guide.manifest.config.get("num_timesteps", guide.counts.get("num_timesteps"))
    if not objective_of_model(model).continuous and other not in (own, None):
        raise UserError(
            f"the guide was trained with {other} timesteps, and the model with {own}: the same t is another noise for "
            "it; use a guide with the same train.num_timesteps"
        )


def check_autoencoder(inputs: Mapping[str, Artifact | Source]) -> None:
    """Raise UserError unless the checkpoint was trained on latents of the autoencoder that decodes the samples.

    An autoencoder that was lost and fitted again has the same fingerprint but may have other weights. An imported model
    does not record its autoencoder.
    """
    trained_with = artifact(inputs, "checkpoint").counts["autoencoder_digest"]
    digest = artifact(inputs, "autoencoder").manifest.digest
    if trained_with not in (digest, None):
        raise UserError(
            f"the checkpoint was trained on latents of autoencoder {trained_with[:12]}, but this one is {digest[:12]}: "
            "a different one, or rebuilt with other weights; use the autoencoder of the training, or remove the "
            "manifests of latents and checkpoint to rebuild them"
        )
    autoencoder.check_checkpoint_scale(artifact(inputs, "checkpoint"), artifact(inputs, "autoencoder"))


def model_config_of(checkpoint: Artifact) -> dict[str, Any]:
    """The ModelConfig of a checkpoint artifact as plain values."""
    from edt_core.store.layout import MODEL_CONFIG

    values: dict[str, Any] = checkpoint.read_json(f"{checkpoint.counts['final']}/{MODEL_CONFIG}")
    return values


def load_units(features: Artifact, repeat: int = 0) -> dict[str, NDArray[Any]]:
    """Every unit of a repeat, joined in order of sample: `indices`, `labels`, `<space>.features`, `images` and so on.

    Raises UserError unless it has samples 0..n-1 of that repeat's seed, each once and in order; ManifestError if a file
    has changed.
    """
    config = SampleConfig.model_validate(features.manifest.config)
    units = list(_units(features, config, repeat))
    names = dict.fromkeys(name for unit in units for name in unit)
    joined = {name: np.concatenate([unit[name] for unit in units if name in unit]) for name in names}
    seeds = np.full(config.num_samples, config.seed + repeat)
    is_complete = bool(units) and np.array_equal(joined["indices"], np.arange(config.num_samples))
    if not is_complete or not np.array_equal(joined["seeds"], seeds):
        raise UserError(
            f"{features.folder.uri} does not contain samples 0..{config.num_samples - 1} of seed "
            f"{config.seed + repeat}, each once and in order; run sample again"
        )
    return joined


def _units(features: Artifact, config: SampleConfig, repeat: int) -> Iterator[dict[str, NDArray[Any]]]:
    first = repeat * units_per_repeat(config)
    names = {FEATURE_UNIT.format(first + number) for number in range(units_per_repeat(config))}
    features.verify_once(FEATURE_UNITS)
    for entry in features.entries(FEATURE_UNITS):
        if entry.path in names:
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
