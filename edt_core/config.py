"""Configuration of each stage: one frozen pydantic schema per stage. Unknown keys are rejected.

A field declared with `runtime(...)` affects how a stage runs, not its result: it is not part of the fingerprint.
"""

import json
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


def added(default: Any, *, absent: Any = None, **constraints: Any) -> Any:
    """A field added in a later version: at its default it counts as absent, so that older artifacts are reused.

    `absent`: another value that means what versions without the field did, and counts as absent as well; None for none.
    """
    extra: dict[str, Any] = {"added": True} if absent is None else {"added": True, "absent": absent}
    return Field(default, json_schema_extra=extra, **constraints)


def added_runtime(default: Any, **constraints: Any) -> Any:
    """A field added in a later version that does not change the result of its stage."""
    return Field(default, json_schema_extra={"runtime": True, "added": True}, **constraints)


def names_input(default: Any, **constraints: Any) -> Any:
    """An added field that names an input of its stage: what it names counts, as an input, and its text does not."""
    return added_runtime(default, **constraints)


def result_fields(section: Section) -> dict[str, Any]:
    """The section as JSON values without its runtime fields: the part that enters a fingerprint."""
    fields: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if not (_marked(info, "runtime") or _is_absent(info, value)):
            fields[name] = value
    values = section.model_validate(fields).model_dump(mode="json", include=set(fields))
    return values | {name: result_fields(value) for name, value in fields.items() if isinstance(value, Section)}


def recorded_fields(section: Section) -> dict[str, Any]:
    """The section as JSON values for a record: an added field at its default is left out.

    Records of an earlier version and of this one are then equal if their configurations mean the same.
    """
    fields: dict[str, Any] = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if _marked(info, "added") and value == info.default:
            del fields[name]
        elif isinstance(value, Section):
            fields[name] = recorded_fields(value)
    return fields


def _is_absent(info: FieldInfo, value: Any) -> bool:
    """Whether a value of an added field means what versions without the field did."""
    extra = info.json_schema_extra
    if not isinstance(extra, dict) or not extra.get("added"):
        return False
    return bool(value == info.default or ("absent" in extra and value == extra["absent"]))


def _marked(info: FieldInfo, mark: str) -> bool:
    """Whether a field was declared with `runtime` or `added`."""
    return isinstance(info.json_schema_extra, dict) and bool(info.json_schema_extra.get(mark))


def check_keep(value: tuple[int, int] | None) -> tuple[int, int] | None:
    """The N and M of a depth pruning. Raises ValueError unless 1 <= N < M, and M is small enough to try all choices."""
    if value is not None and not 1 <= value[0] < value[1] <= _MAX_GROUP:
        raise ValueError(
            f"N of M blocks are {value[0]} of {value[1]}; N must be at least 1 and below M, and M at most "
            f"{_MAX_GROUP}: [1, 2] halves the depth"
        )
    return value


# With `train.holdout: auto` this share of the images is held out, in a data set of at least so many images.
AUTO_HOLDOUT, AUTO_HOLDOUT_FROM = 0.01, 10_000
_MOST_CANONICAL_NODES = 8
_MAX_GROUP = 14  # blocks: half of them are 3,432 choices
_MAX_EMA_WIDTH = 0.28  # as edt_core.training.posthoc.profile.MAX_WIDTH

AmmPreset = Literal["every_block", "encoder", "decoder", "alternating"]
SourceKind = Literal["auto", "digits", "image_folder", "labels", "ilsvrc2012", "webdataset", "parquet"]


class SourceConfig(Section):
    """Existing labelled images: their location, their layout, and which of them to use."""

    kind: SourceKind = Field("auto", description="layout; 'auto' detects it from the files, 'digits' needs no path")
    path: str | None = Field(None, description="folder, file or URI (s3://...) of the images")
    labels: str | None = Field(
        None, description="CSV or JSON file of (file name, class) for a flat folder; a name inside it, a path or a URI"
    )
    classes: tuple[str, ...] = Field((), description="names of the classes to use; empty for all")
    limit: int | None = Field(None, ge=1, description="use this many images, at even distances")
    class_folder: Literal["first", "last"] | None = Field(
        None,
        description="of root/a/b/image: 'first' uses class a, 'last' class a/b; null for first, unless it is ambiguous",
    )
    allow_empty_classes: bool = Field(False, description="use folders without an image as classes without images")

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Accept `cat,dog` as well as a list; numbers become names."""
        names = value if isinstance(value, list | tuple) else str(value).split(",")
        return tuple(str(name).strip() for name in names)

    @model_validator(mode="after")
    def _has_path(self) -> "SourceConfig":
        if self.kind != "digits" and not self.path:
            raise ValueError("source.path is missing; set it to the images, for example source.path=/data/images")
        return self


class PreprocessConfig(Section):
    """A source of images -> image shards."""

    image_size: int = Field(256, ge=8, le=4096, description="side of the square images in pixels")
    images_per_shard: int = Field(4096, ge=1, description="images in every shard except the last")
    max_shard_bytes: int = Field(
        1 << 30, ge=1 << 16, description="upper limit for the size of a shard; images count as uncompressed"
    )
    max_bad_fraction: float = runtime(
        0.001,
        ge=0,
        le=1,
        description="fail if more than this fraction of the images is unreadable, also on reuse; one unreadable image "
        "is allowed in a set of any size, unless this is 0",
    )
    image_format: Literal["webp", "png", "jpeg"] = Field(
        "webp", description="webp (lossless) and png keep every pixel; jpeg does not: do not use it as FID reference"
    )
    jpeg_quality: int = Field(95, ge=1, le=100, description="quality with image_format jpeg")
    decoder: Literal["pillow", "simplejpeg"] = Field(
        "pillow", description="pillow, as for published reference numbers; simplejpeg is faster, its pixels differ"
    )
    rotate_by_exif: bool = Field(False, description="turn photos upright; published numbers are without rotation")

    def allowed_unreadable(self, images: int) -> int:
        """The most unreadable images among this many: the fraction of them, but at least one unless it is 0."""
        return max(1, math.floor(self.max_bad_fraction * images + 1e-9)) if self.max_bad_fraction else 0


class AutoencoderConfig(Section):
    """A published autoencoder (`pretrained`), or one fitted on the images (`pretrained: null`)."""

    pretrained: str | None = Field(
        None,
        description="hub id, local folder or MLflow URI (models:/NAME@ALIAS) of a diffusers autoencoder",
    )
    kind: Literal["kl", "fsq"] = added(
        "kl",
        description="what is fitted: kl, latents of a normal distribution, or fsq (arXiv 2309.15505), values of 1,000 "
        "codes in 4 channels, which MaskGIT needs",
    )
    downsample_factor: int = Field(8, description="image side / latent side; must match `pretrained` if that is set")
    latent_channels: int = Field(4, ge=1, description="channels of the latents; must match `pretrained` if that is set")
    base_channels: int = Field(
        32, ge=8, multiple_of=8, description="channels of the first level; they double at each level"
    )
    layers_per_block: int = Field(1, ge=1, description="residual layers per level")
    steps: int = Field(20_000, ge=1, description="steps of the fit")
    batch_size: int = Field(64, ge=1, description="images per step of the fit")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the fit (one cycle)")
    kl_weight: float = Field(
        1e-6, ge=0, description="weight of the KL divergence of the posterior, relative to the pixel error"
    )
    max_images: int = Field(50_000, ge=1, description="fit on at most this many images, taken at even distances")
    augment: Literal["none", "flip"] = added(
        "none", description="flip: each image of a batch is mirrored with probability 1/2; for few images"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of initial weights, image order and noise")
    num_cpus: int = runtime(2, ge=1, description="CPUs of the fit")
    num_gpus: float = runtime(0, ge=0, description="GPUs of the fit: 0 or 1")

    def published(self) -> "AutoencoderConfig":
        """The configuration with only the fields that apply to a published autoencoder, not those of the fit."""
        fields = {"pretrained", "downsample_factor", "latent_channels"}
        return AutoencoderConfig(**self.model_dump(include=fields))

    @model_validator(mode="after")
    def _factor_is_a_power_of_two(self) -> "AutoencoderConfig":
        if self.downsample_factor < 2 or self.downsample_factor & (self.downsample_factor - 1):
            raise ValueError(
                f"downsample_factor is {self.downsample_factor}; it must be a power of two from 2 on, such as 4 or 8"
            )
        return self

    @model_validator(mode="after")
    def _codes_have_four_channels(self) -> "AutoencoderConfig":
        if self.kind == "fsq" and self.latent_channels != 4:
            raise ValueError(
                f"latent_channels is {self.latent_channels}, but the codes of kind fsq have the levels 8, 5, 5 and 5 "
                "in 4 channels; set latent_channels=4, or kind=kl"
            )
        if self.kind == "fsq" and self.kl_weight != type(self).model_fields["kl_weight"].default:
            raise ValueError(
                f"kl_weight is {self.kl_weight:g}, but kind is fsq, whose codes have no distribution to compare; leave "
                "kl_weight out"
            )
        return self


class EncodeConfig(Section):
    """Image shards -> latent shards."""

    precision: Literal["fp32", "tf32", "fp16", "bf16"] = Field(
        "fp32", description="precision of the autoencoder; below fp32 its error against fp32 is measured and recorded"
    )
    store: Literal["fp32", "fp16", "bf16"] = added(
        "fp32",
        description="numbers in which latents are stored; fp16 and bf16 take half the disk, and the largest rounding "
        "error is in the manifest (store_error). fp16 rounds 8 times finer, and ends at 65504",
    )
    write_webdataset: bool = Field(False, description="also write WebDataset shards with the same rows")
    batch_size: int = runtime(64, ge=1, description="images per batch of the autoencoder")
    num_decode_threads: int = runtime(2, ge=1, description="threads per worker that decode images ahead")
    num_workers: int = runtime(2, ge=1, description="workers; each loads the autoencoder once and encodes many shards")
    num_cpus_per_worker: float = runtime(1, ge=0, description="CPUs, and threads, per worker")
    num_gpus_per_worker: float = runtime(0, ge=0, description="GPUs per worker; a fraction shares a GPU")


class ClassifierConfig(Section):
    """A small classifier fitted on the real images: the feature space of `fd_classifier`."""

    pretrained: str | None = added(
        None,
        pattern=r"^models:/[\w.-]+(@[\w.-]+|/\d+)$",
        description="registered version (models:/NAME@ALIAS or models:/NAME/3) whose classifier is kept; null fits one",
    )
    feature_dim: int = Field(64, ge=2, description="dimensions of the feature space; less than the number of samples")
    base_channels: int = Field(16, ge=1, description="channels of the first level; they double at each level")
    steps: int = Field(400, ge=1, description="steps of the fit")
    batch_size: int = Field(128, ge=1, description="images per step of the fit")
    lr: float = Field(2e-3, gt=0, description="peak learning rate of the fit (one cycle)")
    max_images: int = Field(50_000, ge=2, description="fit on at most this many images, taken at even distances")
    holdout_fraction: float = Field(
        0.1, gt=0, lt=1, description="fraction of the images held out from the fit to measure its accuracy"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of initial weights, hold-out and image order")
    num_cpus: int = runtime(2, ge=1, description="CPUs of the fit")
    num_gpus: float = runtime(0, ge=0, description="GPUs of the fit: 0 or 1")


class TrainConfig(Section):
    """The training recipe; defaults are the paper's for EDT-S and EDT-B (arXiv 2410.23788, appendix)."""

    model: str = Field(
        "EDT-S/2",
        description="name of a model, such as EDT-S/2 or DiT-XL/4; `edt cost` lists them; each family has a Tiny/2, "
        "and MaskGIT, which predicts masked tokens, MaskGIT-Tiny",
    )
    model_overrides: dict[str, Any] = added(
        {},
        description="fields of the model's configuration with other values than the named model has. EDT: "
        "token_enhancement, position_supplement (false: the down-sampling modules lack their adaptive norm, or their "
        "position embedding), input_mask_ratio, down_mask_ratios, mid_mask_block, mid_mask_ratio, depths. MDTv2: "
        "mask_ratio, depth, decode_depth. DiT, U-ViT: depth. A ratio is a range, [least, most]",
    )
    width: int | None = added(
        None,
        ge=1,
        description="width of the model's first tokens, with heads of the same width; other widths of an EDT keep "
        "their ratio. null for that of the named model",
    )
    mup_base_width: int | None = added(
        None,
        ge=1,
        description="width for which lr was found: muP (arXiv 2203.03466) adapts rates and initial weights to the "
        "model's own width, so that the same lr fits; null for none",
    )
    amm_blocks: tuple[int, ...] | Literal["paper"] | AmmPreset = added(
        (),
        description="0-based blocks with AMM in the training, which is then the model's own (sample.amm_blocks=model); "
        "'paper': published for this model without guidance; or a part of the model",
    )
    global_batch_size: int = Field(256, ge=1, description="samples per step, over all workers")
    max_steps: int = Field(400_000, ge=0, description="number of steps; 0 keeps the untrained model of this seed")
    max_epochs: float | None = Field(None, gt=0, description="end after this many epochs, if that is before max_steps")
    max_hours: float | None = Field(
        None, gt=0, description="end after this training time, restarts included; does not shorten the lr schedule"
    )
    optimizer: Literal["adan", "adamw", "muon"] = Field(
        "adan",
        description="Adan (arXiv 2208.06677), as in the paper, AdamW, or Muon (arXiv 2502.16982): orthogonal steps for "
        "the matrices of the blocks, and AdamW for all other parameters",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_final: float = Field(5e-5, ge=0, description="learning rate at the last step")
    lr_schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear",
        description="decay of the learning rate from lr to lr_final over all steps; constant for no decay; wsd decays "
        "over the last decay_fraction of the steps",
    )
    decay_fraction: float = added(0.2, gt=0, le=1, description="with lr_schedule wsd: share of the steps that decay")
    decay_shape: Literal["linear", "1-sqrt"] = added(
        "linear",
        description="with lr_schedule wsd: linear, or 1-sqrt (arXiv 2405.18392), which falls faster at first",
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises from 0 to lr")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float | None = Field(None, gt=0, description="clip the gradient norm to this; null for no clipping")
    ema_decay: float | tuple[float, ...] = Field(
        0.9999, description="one EMA decay or several; the first one's weights are sampled and registered"
    )
    ema_widths: tuple[float, ...] = added(
        (),
        description="widths of power-function averages (arXiv 2312.02696) to track as well, such as [0.05, 0.1]: "
        "standard deviations as a share of the training. From their snapshots `edt ema` makes any other width",
    )
    ema_snapshots: int = added(20, ge=1, description="with ema_widths: snapshots of these averages, at even distances")
    ema_snapshot_dtype: Literal["bf16", "fp16", "fp32"] = added(
        "bf16",
        description="with ema_widths: precision of the snapshots; fp16 rounds 8 times finer than bf16 in the same "
        "space, for weights below 65,504",
    )
    class_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="probability of dropping a label, which classifier-free guidance needs"
    )
    mirror_prob: float = Field(0.5, ge=0, le=1, description="probability of a mirror image; 0 if left and right matter")
    masked_loss: bool = Field(
        True,
        description="add the masked loss to the full loss; false for the paper's EDT*, and for models without masks",
    )
    timestep_sampler: Literal["loss-second-moment", "uniform", "logit-normal"] = Field(
        "loss-second-moment",
        description="timesteps in proportion to the second moment of their losses, uniformly, or logit-normal(0, 1): "
        "the middle more often than the ends (arXiv 2403.03206)",
    )
    time_shift: float = added(
        1.0,
        gt=0,
        description="with objective flow: shift s of the noise's share, s n / (1 + (s - 1) n); above 1 for more noise, "
        "as for latents of many numbers",
    )
    num_timesteps: int = Field(
        1000, gt=20, description="timesteps of the noise schedule; its last beta, 20 / num_timesteps, must be below 1"
    )
    min_snr_gamma: float | None = Field(5.0, gt=0, description="Min-SNR weight of the squared error; null for none")
    objective: str = added(
        "epsilon",
        description="what the model learns to predict: epsilon (the noise), v_prediction, flow, or masked_tokens, the "
        "only one of MaskGIT",
    )
    latent_norm: bool = added(
        False,
        description="normalise the latents by channel to mean 0 and standard deviation 1, with the statistics in the "
        "autoencoder's configuration, or else those of the latents; with init_from those of that model stay",
    )
    init_from: str | None = names_input(
        None,
        description="model to start from: NAME@ALIAS or NAME/VERSION of the registry, an MLflow run, a checkpoint, a "
        "diffusers folder; null for random weights. What it holds counts, not its name",
    )
    init_weights: Literal["ema", "raw"] = added(
        "ema", description="of `init_from`: its averaged weights, or those that its optimizer stepped"
    )
    trainable: Literal["all", "difffit", "bias"] = added(
        "all",
        description="parameters to train; difffit (arXiv 2304.06648): biases, class table, norms and a scale per "
        "branch; bias: biases and class table. Both need init_from, and a rate about 10 times as high",
    )
    init_optimizer: Literal["fresh", "keep"] = added(
        "fresh", description="keep takes over the optimizer's state of `init_from`, a checkpoint of the same shapes"
    )
    align: Literal["autoencoder", "self", "features"] | None = added(
        None,
        description="additional loss: hidden states of a block, through a head, are aligned with the clean latents "
        "(autoencoder, after SRA 2, arXiv 2601.17830), with a later block of the EMA model at less noise (self, SRA, "
        "arXiv 2505.02831), or with a feature network's tokens of the image (features, REPA, arXiv 2410.06940); null "
        "for none",
    )
    align_block: int | None = added(
        None,
        ge=1,
        description="with align: the number of blocks before these hidden states; null for 8 of 28 blocks, or a third "
        "of them in other models",
    )
    align_target_block: int | None = added(
        None,
        ge=1,
        description="with align self: the number of blocks of the EMA model before the target; null for 16 of 28 "
        "blocks (20 with flow matching), or two thirds of them in other models",
    )
    align_features: tuple[int, int] = added(
        (16, 768),
        description="with align features: side of the square of its tokens, and their width; those of DINOv2-B",
    )
    align_distance: Literal["smooth_l1", "cosine", "channel_cosine"] | None = added(
        None,
        description="with align: smooth L1 (beta 0.05), or 1 - cosine of each token's features (cosine) or of each "
        "feature over the tokens (channel_cosine, what SRA's code calls cos); null for cosine with features, and "
        "smooth_l1 otherwise",
    )
    align_weight: float | None = added(
        None,
        ge=0,
        description="with align: weight of this loss; null for 1 (autoencoder), 0.2 (self) or 0.5 (features) "
        "with smooth_l1, and 0.5 with a cosine",
    )
    distill: "DistillConfig | None" = added(
        None,
        description="learn the sampling of the model of `init_from`, the teacher, in fewer steps (progressive "
        "distillation, arXiv 2202.00512), as `edt distill` sets it; null to learn from data",
    )
    prune: tuple[int, int] | None = added(
        None,
        description="[N, M]: learn which N of each M blocks in a row to keep, and leave the others out of the model of "
        "`init_from` (TinyFusion, arXiv 2412.01199), as the step of `edt prune` does; null to train a model",
    )
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="precision of the model's matrix products; losses, softmax statistics, optimizer and EMA stay fp32",
    )
    max_rollbacks: int = runtime(
        3, ge=0, description="how often to go back to a checkpoint and skip a step whose loss or gradient is not finite"
    )
    reader: Literal["arrow", "stream", "webdataset"] = Field(
        "arrow",
        description="arrow maps all shards and shuffles globally; stream fetches them block by block, for latents that "
        "do not fit the disk, and shuffles within blocks of shards, equally for any number of workers; webdataset "
        "streams tars: it shuffles within a buffer, its order depends on the number of workers, and it cannot resume "
        "exactly within an epoch",
    )
    shuffle_block: int = added(
        8,
        ge=1,
        description="with reader stream: shards of each canonical node whose rows are mixed; twice as many are on the "
        "disk of a machine",
    )
    num_canonical_nodes: int | None = added(
        None,
        ge=1,
        description="with reader stream: equal parts of the global batch, each with shards of its own, so a divisor of "
        "global_batch_size; a machine fetches the shards of the parts that its workers train on, so use a multiple of "
        "the number of machines; null for the largest divisor up to 8",
    )
    shuffle_buffer: int = Field(
        10_000, ge=1, description="with reader webdataset: samples in a worker's shuffle buffer"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=1 << 63,
        description="seed of initial weights, data order, flips, noise, timesteps, masks and dropped labels",
    )
    seeds: tuple[int, ...] = added(
        (),
        description="instead of seed: train once with each of these seeds, register the first, and report mean and "
        "standard deviation over the trainings; for a pipeline",
    )
    log_every: int = Field(50, ge=1, description="steps between two rows of the loss history")
    holdout: float | Literal["auto"] = added(
        "auto",
        absent=0.0,
        description="share of the images that is held out to measure the loss on, up to 0.5 and at least 64 images; 0 "
        "for none; auto for 0.01 from 10,000 images on, and none of fewer",
    )
    validate_every: int | None = added(
        None, ge=1, description="steps between two measurements of the held-out loss; null for about 1 % of the time"
    )
    checkpoint_every: int = runtime(5_000, ge=1, description="steps between two checkpoints")
    num_to_keep: int = runtime(2, ge=1, description="newest checkpoints to keep, besides the one with the lowest loss")
    keep_every: int | None = added(
        None, ge=1, description="steps between two checkpoints that are never removed; null for none"
    )
    patience: int | None = added(
        None,
        ge=1,
        description="evaluations along the training without a better value after which it ends; null for never",
    )
    preview_every: int | None = runtime(None, ge=1, description="steps between two sample grids; null for none")
    num_workers: int | tuple[int, int] = runtime(
        1, description="data-parallel workers, or [minimum, maximum] to use as many of them as the cluster has"
    )
    micro_batch_size: int | None = runtime(
        None,
        ge=1,
        description="most samples in a forward pass of a worker; null for its share at the maximum number of workers",
    )
    num_cpus_per_worker: float = runtime(1, gt=0, description="CPUs, and threads, per worker")
    use_gpu: bool = runtime(False, description="use one GPU per worker")
    shard: Literal["none", "optimizer", "full"] = added_runtime(
        "none",
        description="optimizer: each worker has the optimizer's state and the averages of a part of the weights alone; "
        "the result, and the checkpoints, are the same. full: also the weights and gradients, by PyTorch's "
        "fully_shard; the result is the same up to the order of sums. A checkpoint of each resumes in the others",
    )
    compile: bool | Literal["reduce-overhead"] | None = runtime(
        None,
        description="torch.compile the blocks and the optimizer, for faster steps after a slower start; null "
        "for true on GPUs and false on CPUs; reduce-overhead also replays the blocks as CUDA graphs, for few samples "
        "per GPU. Where compiling fails, the training continues without it",
    )
    activation_checkpointing: bool = runtime(False, description="recompute blocks in the backward pass to save memory")
    max_failures: int = runtime(3, ge=-1, description="worker failures to recover from; -1 for any number")
    gradient_dtype: Literal["fp32", "bf16"] = added(
        "fp32",
        description="precision in which workers add their gradients; bf16 halves the traffic between nodes, and the "
        "result depends on the number of workers",
    )
    residual_dtype: Literal["fp32", "bf16"] = added(
        "fp32",
        description="with precision bf16: precision of the tokens between blocks; bf16 needs less memory and time, and "
        "the statistics of norms stay fp32",
    )
    attention_table: str | None = added_runtime(
        None,
        description="JSON file, at the same path here and on each worker, that names the form of attention by number "
        'of tokens, such as {"64": "written_out", "256": "sdpa"}; null for the usual forms',
    )
    timeout_s: int = added_runtime(
        7200,
        ge=1,
        description="how long a worker waits for the others before the training fails, such as for worker 0 while it "
        "writes a checkpoint to a slow store",
    )

    @field_validator("ema_decay")
    @classmethod
    def _decays_are_rates(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        decays = value if isinstance(value, tuple) else (value,)
        if not decays or not all(0 <= decay < 1 for decay in decays) or len(set(decays)) != len(decays):
            raise ValueError(f"ema_decay is {value}; it must be a number from 0 to below 1, or several different ones")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds_are_different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value) or not all(0 <= seed < 1 << 63 for seed in value):
            raise ValueError(f"seeds is {list(value)}; it must be a list of different numbers from 0 to below 2^63")
        return value

    @field_validator("ema_widths", mode="before")
    @classmethod
    def _widths_are_shares(cls, value: Any) -> Any:
        widths = value if isinstance(value, list | tuple) else (value,)
        shares = [width for width in widths if isinstance(width, int | float) and 0 < width <= _MAX_EMA_WIDTH]
        if len(set(shares)) != len(widths):
            raise ValueError(
                f"ema_widths is {value}; it must be a list of different numbers above 0 and at most {_MAX_EMA_WIDTH}"
            )
        return tuple(widths)

    @field_validator("holdout", mode="before")
    @classmethod
    def _holdout_is_a_share(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 0.5):
            return value
        raise ValueError(
            f"holdout is {value!r}; it must be the share of the images to hold out, above 0 and at most 0.5, or 0 for "
            "none, or auto"
        )

    @field_validator("prune")
    @classmethod
    def _prune_keeps_some(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        return check_keep(value)

    @model_validator(mode="after")
    def _has_seed_or_seeds(self) -> "TrainConfig":
        if self.seeds and self.seed:
            raise ValueError(
                f"seed is {self.seed} and seeds is {list(self.seeds)}; leave out seed, or put it first in seeds"
            )
        return self

    @model_validator(mode="after")
    def _canonical_nodes_divide_the_batch(self) -> "TrainConfig":
        if self.reader == "stream" and self.global_batch_size % self.canonical_nodes:
            raise ValueError(
                f"num_canonical_nodes is {self.num_canonical_nodes}, which does not divide global_batch_size, "
                f"{self.global_batch_size}: each canonical node has an equal part of the batch. Set a divisor of it"
            )
        return self

    @model_validator(mode="after")
    def _held_out_rows_can_be_read(self) -> "TrainConfig":
        if self.holdout_share and self.reader == "webdataset":
            raise ValueError(
                f"holdout is {self.holdout_share:g}, but reader is {self.reader}, which reads no single rows; set "
                "holdout=0, or reader=arrow or stream"
            )
        return self

    @model_validator(mode="after")
    def _snapshots_have_an_end(self) -> "TrainConfig":
        if self.patience is not None and self.ema_widths:
            raise ValueError(
                f"patience is {self.patience}, so the number of steps is not known before, but the snapshots of "
                f"ema_widths {list(self.ema_widths)} are taken at shares of it; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _muon_has_matrices(self) -> "TrainConfig":
        if self.optimizer == "muon" and self.trainable != "all":
            raise ValueError(
                f"optimizer is muon, but trainable is {self.trainable}, which trains none of the matrices that Muon is "
                "for; set optimizer=adan or adamw, or trainable=all"
            )
        return self

    @model_validator(mode="after")
    def _full_shards_suffice(self) -> "TrainConfig":
        if self.shard == "full" and (problem := self.refusal_of_full()):
            raise ValueError(f"shard is full, but {problem}, or shard=optimizer")
        return self

    @model_validator(mode="after")
    def _workers_fit(self) -> "TrainConfig":
        fewest, most = self.worker_range
        if not 1 <= fewest <= most:
            raise ValueError(f"num_workers is {self.num_workers}; it must be a number from 1 on, or [minimum, maximum]")
        if most > self.global_batch_size:
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}, less than the {most} workers; "
                f"use at most {self.global_batch_size} workers, or a larger batch"
            )
        return self

    @model_validator(mode="after")
    def _alignment_is_complete(self) -> "TrainConfig":
        fields = ("align_block", "align_target_block", "align_features", "align_distance", "align_weight")
        changed = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
        if self.align is None and changed:
            raise ValueError(
                f"{changed[0]} is {getattr(self, changed[0])}, but align is null; set align to autoencoder, self or "
                "features"
            )
        if self.align in ("autoencoder", "features") and self.align_target_block is not None:
            raise ValueError(
                f"align_target_block is {self.align_target_block}, but align is {self.align}, whose target is no "
                "block; leave it out, or set align=self"
            )
        if min(self.align_features) < 1:
            raise ValueError(f"align_features is {self.align_features}; side and width of the tokens are at least 1")
        if self.align == "features" and self.reader == "webdataset":
            raise ValueError(
                f"align is features, but reader is {self.reader}, which reads no tokens; set reader=arrow or stream, "
                "or another align"
            )
        if self.align is not None and self.init_optimizer == "keep":
            raise ValueError(
                "init_optimizer is keep, but the head of align begins with random weights and has no optimizer state; "
                "set init_optimizer=fresh"
            )
        return self

    @model_validator(mode="after")
    def _distillation_has_one_loss(self) -> "TrainConfig":
        if self.distill is None:
            return self
        alone = {"masked_loss": False, "align": None, "trainable": "all", "min_snr_gamma": None}
        for name, value in {**alone, "timestep_sampler": "uniform", "time_shift": 1.0}.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but distill is set: a student learns the teacher's steps "
                    f"alone, at their own times and weights; set {name}={str(value).lower().replace('none', 'null')}"
                )
        return self

    @model_validator(mode="after")
    def _pruning_has_one_loss(self) -> "TrainConfig":
        if self.prune is None:
            return self
        alone = {"masked_loss": False, "align": None, "trainable": "all", "distill": None, "max_epochs": None}
        for name, value in {**alone, "init_optimizer": "fresh", "ema_widths": ()}.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but prune is set: such a training learns which blocks to keep, "
                    f"from the loss of the full pass alone; set {name}={json.dumps(value)}"
                )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """All decays; the first is that of the registered weights."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    @property
    def passes(self) -> int:
        """Forward passes per step: the full one, and the masked one if it is enabled."""
        return 2 if self.masked_loss else 1

    def refusal_of_full(self) -> str | None:
        """Why this training cannot have shard=full, and what to set instead; None if it can."""
        for name, value, allowed, reason in (
            ("optimizer", self.optimizer, ("adan", "adamw"), "which needs whole matrices; set optimizer=adan or adamw"),
            ("align", self.align, (None, "autoencoder", "features"), "which needs a whole average; set align=features"),
            ("mup_base_width", self.mup_base_width, (None,), "whose rates are of whole matrices; leave it out"),
            ("trainable", self.trainable, ("all",), "whose optimizer and averages are small; set shard=none"),
            ("prune", self.prune, (None,), "whose gates are not divided; set shard=none"),
            ("compile", self.compile, (None, False, True), "whose graphs need weights in one place; set compile=true"),
        ):
            if value not in allowed:
                return f"{name} is {value}, {reason}"
        batch, most = self.global_batch_size, self.micro_batch()
        for workers in range(self.worker_range[0], min(self.worker_range[1], batch) + 1):
            passes = math.ceil(math.ceil(batch / workers) / most)
            if batch // workers < passes:
                return (
                    f"of {workers} workers some have {batch // workers} of the {batch} samples of global_batch_size, "
                    f"and all must take part in {passes} micro-batches; set micro_batch_size=2"
                )
        return None

    def micro_batch(self) -> int:
        """Most samples in a forward pass of a worker; gradients of further samples are accumulated."""
        return self.micro_batch_size or -(-self.global_batch_size // self.worker_range[1])

    @property
    def canonical_nodes(self) -> int:
        """`num_canonical_nodes`, decided."""
        if self.num_canonical_nodes is not None:
            return self.num_canonical_nodes
        return next(nodes for nodes in range(_MOST_CANONICAL_NODES, 0, -1) if self.global_batch_size % nodes == 0)

    @property
    def holdout_share(self) -> float:
        """The share of the images that is held out; 0 for `auto` until `settled` has decided on it."""
        return 0.0 if self.holdout == "auto" else float(self.holdout)

    def settled(self, images: int | None) -> "TrainConfig":
        """The configuration of a training on so many images: `holdout` is a number, unless `images` is None.

        It is settled before a fingerprint is computed. Without held-out images the fingerprint is that of versions
        before there was `holdout`, whose trainings held out nothing.
        """
        share = self.holdout_share
        if self.holdout == "auto":
            if images is None:
                return self
            share = AUTO_HOLDOUT if images >= AUTO_HOLDOUT_FROM and self.reader == "arrow" else 0.0
        if self.max_steps == 0:
            share = 0.0
        return self.model_copy(update={"holdout": share, "validate_every": self.validate_every if share else None})

    def total_steps(self, num_samples: int) -> int:
        """Steps of the whole training on `num_samples` that are not held out, without regard to `max_hours`."""
        if self.max_epochs is None:
            return self.max_steps
        return min(self.max_steps, math.ceil(self.max_epochs * num_samples / self.global_batch_size))


class CacheConfig(Section):
    """A cache of features of the model: most steps of a chain predict them from earlier steps."""

    kind: Literal["taylor", "newton", "delta"] = Field(
        description="taylor: outputs of attention and feed-forward layers by TaylorSeer's series; newton: the same by "
        "Newton's interpolation, exact for polynomials; delta: the last change of the tokens by each block"
    )
    interval: int = Field(
        3, ge=1, description="steps from one that computes everything to the next; 1 predicts nothing"
    )
    order: int = Field(2, ge=0, le=8, description="order of the series; 0 repeats the last output; delta has none")
    warmup: int = Field(2, ge=1, description="first steps, which compute everything")


class ChainConfig(Section):
    """How to sample from a model: part of the protocol of every metric, and recorded with a registered model."""

    sampler: Literal["ancestral", "ddim", "dpmsolver++", "unipc", "euler", "heun", "sde", "halton"] = Field(
        "ancestral",
        description="ancestral sampling as in the paper, DDIM, or a diffusers solver that needs few steps; of flow "
        "matching euler, heun or sde; of masked tokens halton (arXiv 2503.17076)",
    )
    num_sampling_steps: int = Field(250, ge=2, description="sampling steps, respaced from the timesteps of training")
    temperature: float = added(
        1.0, gt=0, description="of masked tokens: a code is drawn from the softmax of its logits over this"
    )
    time_shift: float = added(
        1.0, gt=0, description="of flow matching: shift of the steps as in train.time_shift; above 1 for more noise"
    )
    sde_diffusion: Literal["sigma", "sbdm"] = added(
        "sigma", description="with sampler sde: diffusion coefficient 1 - t (sigma) or (1 - t) / t (sbdm)"
    )
    cfg_scale: float = Field(
        1.0, ge=1, description="guidance scale: 1 for no guidance; with a guide, the extrapolation away from it"
    )
    cfg_power: float | None = Field(
        None,
        gt=0,
        description="exponent of MDT's power-cosine schedule, which raises guidance from 1 to cfg_scale; null for none",
    )
    guidance_channels: int | None = Field(3, ge=1, description="number of leading channels to guide; null for all")
    guidance_interval: tuple[float, float] | None = Field(
        None,
        description="training timesteps [from, to) with guidance; of flow matching, times from 0 (noise) to 1 (data); "
        "null for all",
    )
    guidance_reference: Literal["confused"] | None = added(
        None,
        description="what guidance is away from: null for no class; confused for the class that the classifier takes "
        "the sample for besides its own (gradient-free classifier guidance, arXiv 2411.15393)",
    )
    amm_blocks: tuple[int, ...] | Literal["paper", "model"] | AmmPreset = Field(
        (),
        description="0-based blocks with AMM; 'paper': published for this model and scale; 'model': its own; or a part "
        "of the model, of an EDT: all blocks, those up to the middle stage, those after it, or every second one of the "
        "latter",
    )
    amm_radius: float | None = Field(
        None, gt=0, description="distance in tokens beyond which attention is cut; null for the paper's"
    )
    amm_radius_rows: int | None = added(
        None,
        ge=0,
        description="k of a distance sqrt((N - 1)^2 + k) that depends on the side N of each block's grid, instead of "
        "amm_radius; the paper's is 4",
    )
    amm_kernel: Literal["exp_cos", "cos"] | None = Field(
        None, description="decay of attention with distance; null for the paper's"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the model's matrix products; decoding and features are always fp32"
    )
    cache: CacheConfig | None = added(
        None,
        description="predict most features of the model from earlier steps, such as {kind: taylor, interval: 3}; null "
        "to compute every step",
    )

    @model_validator(mode="after")
    def _radius_is_set_once(self) -> "ChainConfig":
        if self.amm_radius is not None and self.amm_radius_rows is not None:
            raise ValueError(
                f"amm_radius is {self.amm_radius:g} and amm_radius_rows {self.amm_radius_rows}; both set the radius: "
                "leave one of them out"
            )
        return self

    @field_validator("guidance_interval")
    @classmethod
    def _interval_has_a_length(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError(
                f"guidance_interval is {list(value)}; it must be [from, to) with 0 <= from < to, in timesteps, or "
                "in times from 0 to 1 of flow matching"
            )
        return value


class DistillConfig(Section):
    """A student that samples in few steps, and how its teacher is sampled."""

    steps: int = Field(ge=2, description="sampling steps of the student, which is not guided")
    teacher: ChainConfig = Field(
        description="fields of `sample` with which the teacher makes the student's steps: its guidance, and AMM; "
        "sampler ddim, or of flow matching euler; num_sampling_steps a multiple of `steps`"
    )
    protocol: ChainConfig | None = runtime(
        None,
        description="fields of `sample` with which the teacher is measured beside the student: those of its own "
        "registration; null for `teacher`",
    )

    @property
    def parts(self) -> int:
        """Steps of the teacher in one step of the student."""
        return self.teacher.num_sampling_steps // self.steps

    @model_validator(mode="after")
    def _teacher_makes_whole_steps(self) -> "DistillConfig":
        steps = self.teacher.num_sampling_steps
        if steps % self.steps:
            raise ValueError(
                f"distill.teacher.num_sampling_steps is {steps}, which is no multiple of the student's {self.steps} "
                f"steps (distill.steps); set it to {-(-steps // self.steps) * self.steps}"
            )
        if self.teacher.cache is not None:
            raise ValueError("distill.teacher.cache is set, but each of the teacher's steps is computed; leave it out")
        if self.teacher.guidance_reference is not None:
            raise ValueError(
                f"distill.teacher.guidance_reference is {self.teacher.guidance_reference}, but the teacher has no "
                "classifier in the training; leave it out"
            )
        return self


TrainConfig.model_rebuild()  # `distill` is declared after it


class SampleConfig(ChainConfig):
    """The samples to draw: with the fields of the chain, the sampling protocol of a metric."""

    num_samples: int = Field(50_000, ge=2, description="samples per repeat; sample i depends only on (seed, i)")
    repeats: int = Field(1, ge=1, le=1000, description="sets of samples, with seeds seed, seed + 1, ...")
    label_policy: Literal["balanced", "uniform", "prior"] = Field(
        "balanced", description="classes in turn, uniformly at random, or at random as often as in training"
    )
    seed: int = Field(0, ge=0, lt=1 << 62, description="seed of labels and noise; sample i depends only on (seed, i)")
    unit_size: int = Field(64, ge=1, description="samples per unit of work; fixed, because it affects rounding")
    keep_images: int | Literal["all"] = Field(
        100, description="number of first samples per repeat to keep as images for the report; 'all' for `edt export`"
    )
    num_workers: int = runtime(1, ge=1, description="workers; each loads the networks once and computes many units")
    num_cpus_per_worker: float = runtime(1, ge=0, description="CPUs, and threads, per worker")
    num_gpus_per_worker: float = runtime(0, ge=0, description="GPUs per worker; a fraction shares a GPU")
    compile: bool = added_runtime(
        False,
        description="torch.compile the blocks, for faster steps after a start of a minute per worker; worth it for "
        "thousands of samples. Only the last bits of the samples change",
    )

    @model_validator(mode="after")
    def _cache_can_be_compiled(self) -> "SampleConfig":
        if self.compile and self.cache is not None and self.cache.kind != "delta":
            raise ValueError(
                f"compile is true, but a cache of kind {self.cache.kind} predicts within the blocks, and these are "
                "compiled as a whole; use kind delta, or compile=false"
            )
        return self

    @field_validator("keep_images")
    @classmethod
    def _keeps_an_image(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"keep_images is {value}; use at least 1, which the report needs, or 'all'")
        return value


class GuideConfig(Section):
    """The model that samples are guided away from: another one, or that of an earlier step of the same training."""

    step: int | None = Field(None, ge=1, description="step of the training; null for another model")


class ReferenceConfig(Section):
    """Features of the real images, or ADM's published statistics of them."""

    keep_features: int = Field(
        10_000,
        ge=4,
        description="features to keep, at even distances, for metrics that compare pairs; statistics use all images",
    )
    batch_size: int = runtime(64, ge=1, description="images per batch of an extractor")
    num_workers: int = runtime(1, ge=1, description="workers; each loads the networks once and computes many parts")
    num_cpus_per_worker: float = runtime(1, ge=0, description="CPUs, and threads, per worker")
    num_gpus_per_worker: float = runtime(0, ge=0, description="GPUs per worker; a fraction shares a GPU")


class ValidateConfig(Section):
    """How often the classifier assigns samples, and real images, to their own class."""

    confidence: float = Field(0.95, gt=0, lt=1, description="confidence level of the accuracies' Wilson intervals")
    num_cpus: float = runtime(1, ge=0, description="CPUs of the computation; 0 to run beside other tasks")
