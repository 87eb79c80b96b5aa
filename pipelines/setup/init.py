"""A first configuration for somebody's images: what is found of them and of the machine, what that suggests, the file.

Everything here is a function of what was answered; the questions are asked by `pipelines.commands.init`.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from shlex import quote
from typing import Any, Literal

import numpy as np

from edt_core.errors import UserError
from edt_core.evaluation.published import AUTOENCODER, AUTOENCODER_CHANNELS, AUTOENCODER_FACTOR
from edt_core.files.place_names import typed_path
from edt_core.network.hub import HUB_ID
from pipelines.setup.autoencoder_facts import published_facts
from pipelines.setup.hardware import Hardware

FIT = "fit"  # the answer that means: fit an autoencoder on the images
SIZES = (32, 64, 128, 256, 512)
_MEASURED = 64  # images whose size is looked at
_CPU_SIZES = (32, 64)
_FEW_IMAGES = 1000
_HARDWARE = re.compile(r"cpu|gpu(?:-([1-9]\d*))?")
_ROOM = 0.8  # of a GPU's memory for what the estimate counts; kernels and libraries take the rest


@dataclass(frozen=True)
class Images:
    """What lies at a path: layout, numbers, and the shorter side in pixels of some of the images."""

    path: str
    kind: str
    images: int
    classes: int
    sides: tuple[int, ...]
    remarks: tuple[str, ...] = ()
    allow_empty_classes: bool = False

    @property
    def side(self) -> int:
        """The median shorter side; 0 where no image could be read."""
        return int(np.median(self.sides)) if self.sides else 0

    def __str__(self) -> str:
        sides = f", about {self.side} px" if self.sides else ", none of those looked at can be read"
        return f"{self.images:,} images of {self.classes} classes ({self.kind}){sides}"


@dataclass(frozen=True)
class Answers:
    """What was asked. `gpus` 0 is a machine without; `autoencoder` None fits one, `inception` None does without FID."""

    images: Images
    name: str
    image_size: int
    gpus: int
    model: str
    autoencoder: str | None = None
    inception: str | None = None


def look_at(path: str, allow_empty_classes: bool = False) -> Images:
    """List the images at a path or URI and measure some. Raises UserError where there are none to train on."""
    from edt_core.config import SourceConfig
    from edt_core.data.sources import detect_kind, list_source, remarks
    from edt_core.data.sources.places import locate
    from edt_core.progress import CollectedWarnings
    from edt_core.store.folder import Folder

    if not path.strip():
        raise UserError("no folder was given; name the one that holds <class>/<image>, or an archive, or a URI")
    folder = Folder.at(path)
    is_pattern = any(mark in path for mark in "*?[{") and not (folder.local and folder.local.exists())
    place = path if is_pattern or folder.local is None else folder.uri
    kind = detect_kind(locate(place))
    notes = CollectedWarnings()
    fields = {"kind": kind, "path": place, "allow_empty_classes": allow_empty_classes}
    listing = list_source(SourceConfig.model_validate(fields), notes)
    chosen = np.unique(np.linspace(0, len(listing) - 1, min(_MEASURED, len(listing))).astype(np.int64))
    sides = [side for image in listing.take(chosen).images() if (side := _shorter_side(image.data))]
    told_of = (*notes.warnings, *remarks(listing))
    return Images(place, kind, len(listing), len(listing.classes), tuple(sides), told_of, allow_empty_classes)


def _shorter_side(data: bytes | None) -> int | None:
    """Of an encoded image, by its header alone; None for what is no image."""
    from PIL import Image

    from edt_core.data.images import image_formats

    try:
        with Image.open(io.BytesIO(data or b""), formats=tuple(image_formats())) as image:
            return min(image.size)
    except Exception:  # Pillow's decoders raise whatever they like on hostile bytes
        return None


def suggested_size(images: Images, gpus: int) -> int:
    """The largest usual size that most images have; on CPUs a small one."""
    sizes = SIZES if gpus else _CPU_SIZES
    return max((size for size in sizes if size <= images.side), default=sizes[0])


def parse_hardware(text: str) -> int:
    """The GPUs that `cpu`, `gpu` or `gpu-8` means. Raises UserError."""
    if not (found := _HARDWARE.fullmatch(text.strip().lower())):
        raise UserError(
            f"the hardware is {text!r}; it takes cpu, gpu (one), or gpu-N with the number of GPUs, as gpu-8"
        )
    return 0 if found[0] == "cpu" else int(found[1] or 1)


def hardware_name(gpus: int) -> str:
    """What `parse_hardware` takes for so many GPUs."""
    return "cpu" if not gpus else "gpu" if gpus == 1 else f"gpu-{gpus}"


def suggested_model(images: Images, gpus: int) -> str:
    """A tiny model on CPUs; on GPUs the larger, the more there are, and only for images that it can learn from."""
    if not gpus:
        return "EDT-Tiny/2"
    if images.images < 50 * _FEW_IMAGES or gpus == 1:
        return "EDT-S/2"
    return "EDT-XL/2" if gpus >= 8 and images.images >= 500 * _FEW_IMAGES else "EDT-B/2"


def suggested_autoencoder(image_size: int, gpus: int) -> str:
    """A published one where there are GPUs to run it and pixels enough that it keeps what is seen."""
    return AUTOENCODER if gpus and image_size >= 128 else FIT


def suggested_name(path: str) -> str:
    """A name for the pipeline after the folder of its images."""
    words = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in re.split(r"[/\\]", path)]
    parts = [word for word in words if word and word not in ("train", "images", "data")]
    return re.sub(r"-(tar|parquet)$", "", parts[-1])[:40].strip("-") if parts else "mine"


def check_name(name: str) -> str:
    """A pipeline's name: an MLflow experiment, and the middle of its model's. Raises UserError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}", name):
        raise UserError(f"the name is {name!r}; use letters, digits, '.', '_' and '-', 61 at most, a letter first")
    return name


def check_size(text: str) -> int:
    """A side in pixels that some autoencoder and the models can take. Raises UserError."""
    if not text.strip().isdecimal() or not 32 <= int(text) <= 4096 or int(text) % 32:
        raise UserError(
            f"the image size is {text!r}; it is a multiple of 32 from 32 to 4096, as {', '.join(map(str, SIZES))}"
        )
    return int(text)


def check_model(name: str) -> str:
    """One of the models there are, by its name in any case. Raises UserError."""
    from edt_core.models import MODEL_NAMES

    found = {known.lower(): known for known in MODEL_NAMES}.get(name.strip().lower())
    if found is None:
        raise UserError(f"there is no model {name!r}; there are {', '.join(MODEL_NAMES)}")
    return found


def check_autoencoder(text: str, image_size: int, model: str) -> str | None:
    """A published autoencoder, None to fit one. Raises UserError where the model cannot take its latents."""
    from edt_core.models import model_config

    if not text.strip():
        raise UserError(f"no autoencoder is named; give a hub id, a folder or models:/NAME@ALIAS, or {FIT!r}")
    published = None if text == FIT else text
    factor, channels = latents_of(published, image_size)
    try:
        model_config(model, image_size, autoencoder_factor=factor, latent_channels=channels)
    except ValueError as error:
        raise UserError(f"{model} does not fit: {error} Or take another autoencoder ({FIT!r}).") from error
    return published


def notes(answers: Answers, machine: Hardware) -> list[str]:
    """What the answers make doubtful, though it can be tried."""
    remarks = list(answers.images.remarks)
    if answers.images.images < _FEW_IMAGES:
        remarks.append(f"{answers.images.images} images are few: a model of any size memorises them")
    if answers.images.sides and answers.image_size > answers.images.side:
        remarks.append(
            f"most images are smaller than {answers.image_size} px ({answers.images.side}): they are enlarged"
        )
    if not answers.gpus and answers.model.rpartition("-")[2] != "Tiny/2":
        remarks.append(f"{answers.model} on CPUs takes weeks; EDT-Tiny/2 is made for them")
    if answers.gpus > len(machine.gpus):
        remarks.append(
            f"this machine has {len(machine.gpus)} GPUs of the {answers.gpus}: run it on a cluster that has them"
        )
    if answers.autoencoder is not None and _known_latents(answers.autoencoder) is None:
        remarks.append(
            f"the configuration of {answers.autoencoder} cannot be read here: factor {AUTOENCODER_FACTOR} and "
            f"{AUTOENCODER_CHANNELS} channels are assumed. Correct both fields under `autoencoder:` if it has others"
        )
    return remarks


def config_text(answers: Answers, machine: Hardware, file: str) -> str:
    """The configuration as commented YAML that `load_config` takes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipelines"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["scalar"] = _scalar
    text = environment.get_template("config.yaml.j2").render(file=quote(file), **_values(answers, machine))
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _scalar(value: str) -> str:
    """A text as YAML reads it back, quoted where it must be."""
    import yaml

    return str(yaml.safe_dump(value, width=math.inf, allow_unicode=True)).removesuffix("\n").removesuffix("\n...")


def _values(answers: Answers, machine: Hardware) -> dict[str, Any]:
    """Everything that the template says."""
    from edt_core.models import model_config

    images, gpus = answers.images, answers.gpus
    cpus_per_gpu = max(1, min(4, machine.cpus // max(gpus, 1))) if gpus <= len(machine.gpus) else 4
    recipe = _gpu_recipe(answers) if gpus else _cpu_recipe(answers)
    workers = gpus or min(2, machine.cpus)
    factor, channels = latents_of(answers.autoencoder, answers.image_size)
    return {
        "name": answers.name,
        "registered": f"{answers.model.split('/')[0].lower()}-{answers.name}-{answers.image_size}",
        "images": images.images,
        "classes": images.classes,
        "kind": images.kind,
        "allow_empty_classes": images.allow_empty_classes,
        "path": images.path,
        "image_size": answers.image_size,
        "model": answers.model,
        "hardware": f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "CPUs",
        "gpus": gpus,
        "workers": workers,
        "cpus_per_gpu": cpus_per_gpu,
        "pool": f", num_gpus_per_worker: 1, num_cpus_per_worker: {cpus_per_gpu}" if gpus else "",
        "images_per_shard": max(1, min(4096, math.ceil(images.images / (2 * workers)))),
        "autoencoder": answers.autoencoder,
        "factor": factor,
        "channels": channels,
        "inception": answers.inception,
        "metric": "fid" if answers.inception else "fd_classifier",
        "feature_dim": _feature_dim(images.images),
        "masked": model_config(answers.model).is_masked,
        "precision": "bf16" if machine.bf16 or gpus > len(machine.gpus) else "fp32",
        "micro_batch": _micro_batch(answers, machine, recipe["global_batch_size"]),
        **recipe,
    }


def latents_of(autoencoder: str | None, image_size: int) -> tuple[int, int]:
    """Image side / latent side, and channels of the latents, with a published autoencoder or a fitted one (None).

    A fitted one has a factor with which small images keep detail. A published one whose configuration cannot be read
    here counts as the papers'. Raises UserError for a local folder that is refused.
    """
    if autoencoder is not None:
        return _known_latents(autoencoder) or (AUTOENCODER_FACTOR, AUTOENCODER_CHANNELS)
    if image_size >= 256 and image_size % 64 == 0:
        return 8, 4
    return (2 if image_size <= 32 else 4), 4


@cache
def _known_latents(autoencoder: str) -> tuple[int, int] | None:
    """Factor and channels of a published autoencoder; None where its configuration cannot be read here."""
    if autoencoder == AUTOENCODER:
        return AUTOENCODER_FACTOR, AUTOENCODER_CHANNELS
    is_folder = typed_path(autoencoder).is_dir()
    if not is_folder and not HUB_ID.fullmatch(autoencoder):
        return None
    try:
        facts = published_facts(autoencoder)
    except UserError:
        if is_folder:
            raise
        return None
    return facts["downsample_factor"], facts["latent_channels"]


def _feature_dim(images: int) -> int:
    """Dimensions of the classifier's features: fewer than there are images, or their covariance has no full rank."""
    return next((dim for dim in (64, 32, 16, 8, 4) if images >= 2 * dim), 2)


def _cpu_recipe(answers: Answers) -> dict[str, Any]:
    """The numbers of docs/results.md: minutes on two cores."""
    return {
        "base_channels": 8,
        "autoencoder_steps": 400,
        "autoencoder_lr": 5.0e-3,
        "classifier_steps": 800,
        "global_batch_size": 64,
        "max_steps": 1500,
        "lr": 3.0e-3,
        "lr_final": 0.0,
        "ema_decay": 0.995,
        "checkpoint_every": 500,
        "num_samples": 1000,
        "num_sampling_steps": 25,
    }


def _gpu_recipe(answers: Answers) -> dict[str, Any]:
    """The paper's recipe, shorter where there are fewer images than in ImageNet."""
    steps = min(400_000, max(20_000, round(400 * answers.images.images / 256, -4)))
    return {
        "base_channels": 64,
        "autoencoder_steps": 20_000,
        "autoencoder_lr": 1.0e-3,
        "classifier_steps": 5000,
        "global_batch_size": 256,
        "max_steps": steps,
        "lr": 5.0e-4 if answers.model.split("-")[1].startswith("XL") else 1.0e-3,
        "lr_final": 5.0e-5,
        "ema_decay": 0.9999 if steps >= 100_000 else 0.999,
        "checkpoint_every": 5000,
        "num_samples": 50_000 if answers.images.images >= 50_000 else 10_000,
        "num_sampling_steps": 250,
    }


def _micro_batch(answers: Answers, machine: Hardware, batch: int) -> int | None:
    """The largest half, quarter and so on of a worker's share that a GPU has room for; None where all of it fits.

    None as well for GPUs that are not here: their memory is not known.
    """
    if not answers.gpus or answers.gpus > len(machine.gpus):
        return None
    from edt_core.config import TrainConfig
    from edt_core.models import model_config
    from edt_core.training.estimate import estimate

    factor, channels = latents_of(answers.autoencoder, answers.image_size)
    network = model_config(
        answers.model,
        answers.image_size,
        answers.images.classes,
        autoencoder_factor=factor,
        latent_channels=channels,
    )
    precision: Literal["bf16", "fp32"] = "bf16" if machine.bf16 else "fp32"
    masked = network.is_masked
    share = micro = math.ceil(batch / answers.gpus)

    def needs(samples: int) -> int:
        train = TrainConfig(model=answers.model, micro_batch_size=samples, precision=precision, masked_loss=masked)
        return estimate(train, network, answers.images.images).memory

    while micro > 1 and needs(micro) > _ROOM * machine.gpu_memory:
        micro = math.ceil(micro / 2)
    return micro if micro < share else None


def summary(answers: Answers) -> Mapping[str, str]:
    """The answers in a few words, for a reader who did not open the file."""
    return {
        "images": str(answers.images),
        "model": f"{answers.model} at {answers.image_size} px on {hardware_name(answers.gpus)}",
        "autoencoder": answers.autoencoder or "fitted on the images",
        "compared by": "FID (Inception)"
        if answers.inception
        else "fd_classifier, in a classifier fitted on the images",
    }
