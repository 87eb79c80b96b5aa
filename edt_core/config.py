"""Configuration of each stage: one frozen pydantic schema a concern. Unknown keys are refused.

A field made with `runtime(...)` says how a stage runs, not what it makes: it stays out of the artifact's fingerprint.
"""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Base of every configuration section."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def runtime(default: Any, **constraints: Any) -> Any:
    """A field that does not change the result of its stage."""
    return Field(default, json_schema_extra={"runtime": True}, **constraints)


def added(default: Any, **constraints: Any) -> Any:
    """A field that came after artifacts were made: at its default it counts as absent, and they are reused."""
    return Field(default, json_schema_extra={"added": True}, **constraints)


def result_fields(section: Section) -> dict[str, Any]:
    """The section as JSON values, without its runtime fields: what a fingerprint is made of."""
    fields: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if _marked(info, "runtime") or (_marked(info, "added") and value == info.default):
            continue
        fields[name] = result_fields(value) if isinstance(value, Section) else value
    return section.model_validate(fields).model_dump(mode="json", include=set(fields))


def recorded_fields(section: Section) -> dict[str, Any]:
    """The section as JSON values, as a record keeps it: an added field that is at its default is left out.

    So the record of an earlier version and one of now are equal where they ask for the same.
    """
    fields: dict[str, Any] = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if _marked(info, "added") and value == info.default:
            del fields[name]
        elif isinstance(value, Section):
            fields[name] = recorded_fields(value)
    return fields


def _marked(info: FieldInfo, mark: str) -> bool:
    """Whether a field was made with `runtime` or `added`."""
    return isinstance(info.json_schema_extra, dict) and bool(info.json_schema_extra.get(mark))


SourceKind = Literal["auto", "digits", "image_folder", "labels", "ilsvrc2012", "webdataset", "parquet"]


class SourceConfig(Section):
    """Labelled images that are there already: where they are, how they are laid out, and which of them are taken."""

    kind: SourceKind = Field("auto", description="layout; 'auto' tells it from what is found, 'digits' needs no path")
    path: str | None = Field(None, description="folder, file or URI (s3://...) of the images")
    labels: str | None = Field(
        None, description="CSV or JSON file of (file name, class) for a flat folder; a name inside it, a path or a URI"
    )
    classes: tuple[str, ...] = Field((), description="names of the classes to take; none for all")
    limit: int | None = Field(None, ge=1, description="take this many images, at even distances")
    class_folder: Literal["first", "last"] | None = Field(
        None, description="of root/a/b/image: 'first' takes class a, 'last' class a/b; first where that is plain"
    )
    allow_empty_classes: bool = Field(False, description="take folders without an image for classes that have none")

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """`cat,dog` as well as a list; names that look like numbers are names."""
        listed = value if isinstance(value, list | tuple) else str(value).split(",")
        return tuple(str(name).strip() for name in listed)

    @model_validator(mode="after")
    def _has_path(self) -> "SourceConfig":
        if self.kind != "digits" and not self.path:
            raise ValueError("source.path is missing: give the images, as --set source.path=/data/images")
        return self


class PreprocessConfig(Section):
    """A source -> image shards."""

    image_size: int = Field(256, ge=8, le=4096, description="side of the square images in pixels")
    images_per_shard: int = Field(4096, ge=1, description="images in every shard but the last")
    max_shard_bytes: int = Field(
        1 << 30, ge=1 << 16, description="no shard is larger; counted as if nothing could be compressed"
    )
    max_bad_fraction: float = runtime(
        0.001, ge=0, le=1, description="unreadable images above this share fail the step, reused or not"
    )
    image_format: Literal["webp", "png", "jpeg"] = Field(
        "webp", description="webp (lossless) and png keep every pixel; jpeg does not, and is no FID reference"
    )
    jpeg_quality: int = Field(95, ge=1, le=100, description="with image_format jpeg")
    decoder: Literal["pillow", "simplejpeg"] = Field(
        "pillow", description="pillow made the published reference numbers; simplejpeg is faster, its pixels differ"
    )
    rotate_by_exif: bool = Field(False, description="turn photos upright; off, as for the published numbers")


class AutoencoderConfig(Section):
    """A published autoencoder (`pretrained`), or one fitted on the images (`pretrained: null`)."""

    pretrained: str | None = Field(
        None,
        description="hub id, local folder or MLflow URI (models:/NAME@ALIAS) of a diffusers autoencoder",
    )
    downsample_factor: int = Field(8, description="image side / latent side; must be that of `pretrained` where given")
    latent_channels: int = Field(
        4, ge=1, description="channels of the latents; must be those of `pretrained` where given"
    )
    base_channels: int = Field(32, ge=8, multiple_of=8, description="channels of the first level; each level doubles")
    layers_per_block: int = Field(1, ge=1, description="residual layers of a level")
    steps: int = Field(20_000, ge=1, description="steps of the fit")
    batch_size: int = Field(64, ge=1, description="images of a step of the fit")
    lr: float = Field(1e-3, gt=0, description="highest rate of the fit, which rises to it and falls again")
    kl_weight: float = Field(
        1e-6, ge=0, description="weight of the posterior's divergence beside the error of the pixels"
    )
    max_images: int = Field(50_000, ge=1, description="above this number, as many images at even distances")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the first weights, the order of the images and the noise")
    num_cpus: int = runtime(2, ge=1, description="CPUs of the fit")
    num_gpus: float = runtime(0, ge=0, description="GPUs of the fit: 0 or 1")

    def published(self) -> "AutoencoderConfig":
        """The fields that matter for a published autoencoder: how one would be fitted does not change it."""
        kept = {"pretrained", "downsample_factor", "latent_channels"}
        return AutoencoderConfig(**self.model_dump(include=kept))

    @model_validator(mode="after")
    def _factor_is_a_power_of_two(self) -> "AutoencoderConfig":
        if self.downsample_factor < 2 or self.downsample_factor & (self.downsample_factor - 1):
            raise ValueError(
                f"downsample_factor is {self.downsample_factor}; a power of two from 2 on is needed, as 4 or 8"
            )
        return self


class EncodeConfig(Section):
    """Image shards -> latent shards."""

    precision: Literal["fp32", "tf32", "fp16", "bf16"] = Field(
        "fp32", description="of the autoencoder; below fp32 its error against fp32 is measured and kept"
    )
    write_webdataset: bool = Field(False, description="also write the row-identical WebDataset shards")
    batch_size: int = runtime(64, ge=1, description="images the autoencoder takes at once")
    num_decode_threads: int = runtime(2, ge=1, description="threads of a worker that decode images ahead")
    num_workers: int = runtime(2, ge=1, description="each loads the autoencoder once and takes shard after shard")
    num_cpus_per_worker: float = runtime(1, ge=0, description="CPUs, and threads, of a worker")
    num_gpus_per_worker: float = runtime(0, ge=0, description="GPUs of a worker; several share one by parts of it")


class ClassifierConfig(Section):
    """A small classifier fitted on the real images: the feature space of `fd_classifier`."""

    feature_dim: int = Field(64, ge=2, description="dimensions of the feature space; fewer than there are samples")
    base_channels: int = Field(16, ge=1, description="channels of the first level; each level doubles")
    steps: int = Field(400, ge=1, description="steps of the fit")
    batch_size: int = Field(128, ge=1, description="images of a step of the fit")
    lr: float = Field(2e-3, gt=0, description="highest rate of the fit, which rises to it and falls again")
    max_images: int = Field(50_000, ge=2, description="above this number, as many images at even distances")
    holdout_fraction: float = Field(0.1, gt=0, lt=1, description="images kept from the fit to measure its accuracy")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the first weights, the hold-out and the order of the images")
    num_cpus: int = runtime(2, ge=1, description="CPUs of the fit")
    num_gpus: float = runtime(0, ge=0, description="GPUs of the fit: 0 or 1")


class TrainConfig(Section):
    """The training recipe; defaults are the paper's for EDT-S and EDT-B (arXiv 2410.23788, appendix)."""

    model: str = Field(
        "EDT-S/2",
        description="name of a model, as EDT-S/2 or DiT-XL/4; `edt cost` lists them, and each family has a Tiny/2",
    )
    global_batch_size: int = Field(256, ge=1, description="samples of a step, whatever the number of workers")
    max_steps: int = Field(400_000, ge=0, description="0 leaves the untrained model of this seed")
    max_epochs: float | None = Field(None, gt=0, description="end after this many epochs, if that is before max_steps")
    max_hours: float | None = Field(
        None, gt=0, description="end after this time of training, restarts included; the learning rate's fall stays"
    )
    optimizer: Literal["adan", "adamw"] = Field("adan", description="Adan (arXiv 2208.06677), the paper's, or AdamW")
    lr: float = Field(1e-3, gt=0, description="learning rate at its highest")
    lr_final: float = Field(5e-5, ge=0, description="what the rate has come to at the last step")
    lr_schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="fall of the rate from lr to lr_final over all steps; constant for none"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the rate rises from 0 to lr, before its fall")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float | None = Field(None, gt=0, description="clip the gradient's norm to this; null for never")
    ema_decay: float | tuple[float, ...] = Field(
        0.9999, description="one decay or several; the first one's weights are sampled from and registered"
    )
    class_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="share of the labels that are dropped, so that guidance has a model without label"
    )
    mirror_prob: float = Field(0.5, ge=0, le=1, description="share of mirror images; 0 where left and right matter")
    masked_loss: bool = Field(
        True,
        description="add the masked loss to the full one; false is the paper's EDT*, and for models without masks",
    )
    timestep_sampler: Literal["loss-second-moment", "uniform"] = Field(
        "loss-second-moment",
        description="timesteps in proportion to the second moment of their losses, or each as likely as any other",
    )
    num_timesteps: int = Field(
        1000, gt=20, description="timesteps of the noise schedule; its last beta is 20 / num_timesteps, less than 1"
    )
    min_snr_gamma: float | None = Field(5.0, gt=0, description="Min-SNR weight of the squared error; null for none")
    objective: str = added(
        "epsilon", description="what the model learns to predict: epsilon (the noise) or v_prediction"
    )
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="of the model's matrix products; losses, softmax statistics, optimizer and EMA stay fp32"
    )
    max_rollbacks: int = runtime(
        3, ge=0, description="losses or gradients that are not finite: go back to a checkpoint, leave the step out"
    )
    reader: Literal["arrow", "webdataset"] = Field(
        "arrow",
        description="arrow maps the shards and shuffles globally; webdataset streams tars that do not fit the disk: "
        "shuffled within a buffer, another order at another number of workers, no exact resume in mid-epoch",
    )
    shuffle_buffer: int = Field(10_000, ge=1, description="with reader webdataset: samples a worker shuffles among")
    seed: int = Field(
        0,
        ge=0,
        lt=1 << 63,
        description="of the first weights and all that is drawn: order, flips, noise, timesteps, masks, dropped labels",
    )
    log_every: int = Field(50, ge=1, description="steps between two rows of the loss history")
    checkpoint_every: int = runtime(5_000, ge=1, description="steps between two checkpoints")
    num_to_keep: int = runtime(2, ge=1, description="newest checkpoints that are kept, beside the one of least loss")
    preview_every: int | None = runtime(None, ge=1, description="steps between two sample grids; null for none")
    num_workers: int | tuple[int, int] = runtime(
        1, description="data-parallel workers, or [fewest, most] to continue with as many as the cluster has"
    )
    micro_batch_size: int | None = runtime(
        None, ge=1, description="most samples a worker takes at once; null for its share among the most workers"
    )
    num_cpus_per_worker: float = runtime(1, gt=0, description="CPUs, and threads, of a worker")
    use_gpu: bool = runtime(False, description="one GPU for each worker")
    compile: bool = runtime(False, description="torch.compile the model: minutes of start for a faster step")
    activation_checkpointing: bool = runtime(
        False, description="compute blocks again in the backward pass: less memory"
    )
    max_failures: int = runtime(3, ge=-1, description="worker failures to recover from; -1 for any number")

    @field_validator("ema_decay")
    @classmethod
    def _decays_are_rates(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        decays = value if isinstance(value, tuple) else (value,)
        if not decays or not all(0 <= decay < 1 for decay in decays) or len(set(decays)) != len(decays):
            raise ValueError(f"ema_decay {value} must be one number in 0..1 (1 excluded), or several different ones")
        return value

    @model_validator(mode="after")
    def _workers_fit(self) -> "TrainConfig":
        fewest, most = self.worker_range
        if not 1 <= fewest <= most:
            raise ValueError(f"num_workers {self.num_workers} must be a number from 1 on, or [fewest, most]")
        if most > self.global_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} has no sample for each of {most} workers; "
                f"use at most {self.global_batch_size} workers"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """All decays, that of the registered weights first."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    @property
    def passes(self) -> int:
        """Forward passes of a step: the full one, and the masked one if it is on."""
        return 2 if self.masked_loss else 1

    def micro_batch(self) -> int:
        """Most samples that a worker takes at once; what it has above that it accumulates."""
        return self.micro_batch_size or -(-self.global_batch_size // self.worker_range[1])

    def total_steps(self, num_samples: int) -> int:
        """Steps of the whole training on a data set of `num_samples`, but for a limit on time."""
        if self.max_epochs is None:
            return self.max_steps
        return min(self.max_steps, math.ceil(self.max_epochs * num_samples / self.global_batch_size))


class ChainConfig(Section):
    """How a model is sampled from: part of every metric's meaning, and kept with a registered model."""

    sampler: Literal["ancestral", "ddim", "dpmsolver++", "unipc"] = Field(
        "ancestral", description="the paper's chain, DDIM, or a solver of diffusers that needs few steps"
    )
    num_sampling_steps: int = Field(
        250, ge=2, description="steps of the chain, respaced from the timesteps of training"
    )
    cfg_scale: float = Field(1.0, ge=1, description="1 for no guidance; with a guide, how far away from it")
    cfg_power: float | None = Field(
        None,
        gt=0,
        description="MDT's power-cosine: guidance grows from 1 to cfg_scale on the way; null for none",
    )
    guidance_channels: int | None = Field(3, ge=1, description="channels that are guided; null for all")
    guidance_interval: tuple[float, float] | None = Field(
        None, description="timesteps [from, to) of training in which guidance acts; null for all"
    )
    amm_blocks: tuple[int, ...] | Literal["paper", "model"] = Field(
        (),
        description="0-based blocks; 'paper': published ones for model and cfg_scale, 'model': its own configuration's",
    )
    amm_radius: float | None = Field(None, gt=0, description="tokens beyond which attention is cut; null as the paper")
    amm_kernel: Literal["exp_cos", "cos"] | None = Field(None, description="fall with distance; null as the paper")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the model's matrix products; decoding and features are always fp32"
    )

    @field_validator("guidance_interval")
    @classmethod
    def _interval_has_a_length(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError(f"guidance_interval {list(value)} must be [from, to) with 0 <= from < to, in timesteps")
        return value


class SampleConfig(ChainConfig):
    """The samples that are drawn: with the chain, the sampling protocol of a metric."""

    num_samples: int = Field(50_000, ge=2, description="of a repeat; sample i is a function of (seed, i)")
    repeats: int = Field(1, ge=1, le=1000, description="sets of samples, of seed, seed + 1 and so on")
    label_policy: Literal["balanced", "uniform", "prior"] = Field(
        "balanced", description="classes in turn, each as likely as any other, or as often as in training"
    )
    seed: int = Field(0, ge=0, lt=1 << 62, description="of labels and noise; sample i is a function of (seed, i)")
    unit_size: int = Field(64, ge=1, description="samples in one unit of work: fixed, so that results do not move")
    keep_images: int | Literal["all"] = Field(
        100, description="first samples of a repeat whose pixels are kept, for the report; 'all' for `edt export`"
    )
    num_workers: int = runtime(1, ge=1, description="each loads the networks once and takes unit after unit")
    num_cpus_per_worker: float = runtime(1, ge=0, description="CPUs, and threads, of a worker")
    num_gpus_per_worker: float = runtime(0, ge=0, description="GPUs of a worker; several share one by parts of it")

    @field_validator("keep_images")
    @classmethod
    def _keeps_an_image(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"keep_images is {value}; the report shows at least one, or give 'all'")
        return value


class ReferenceConfig(Section):
    """Features of the real images, or ADM's published statistics of them."""

    keep_features: int = Field(
        10_000,
        ge=4,
        description="rows kept for metrics that compare pairs, at even distances; statistics are of all",
    )
    batch_size: int = runtime(64, ge=1, description="images that an extractor takes at once")
    num_workers: int = runtime(1, ge=1, description="each loads the networks once and takes part after part")
    num_cpus_per_worker: float = runtime(1, ge=0, description="CPUs, and threads, of a worker")
    num_gpus_per_worker: float = runtime(0, ge=0, description="GPUs of a worker; several share one by parts of it")


class ValidateConfig(Section):
    """How often the classifier takes samples, and real images, to be of their own class."""

    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals of all accuracies (Wilson's)")
    num_cpus: float = runtime(1, ge=0, description="CPUs of the computation; 0 runs beside whatever else does")
