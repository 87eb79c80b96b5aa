"""A first configuration for a user's images: inspection of the images, suggestions, checks of answers, and the file.

Everything here depends only on the answers; `pipelines.commands.init` asks the questions.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edt_core.config import PreprocessConfig
from edt_core.errors import UserError
from edt_core.evaluation.published import AUTOENCODER, AUTOENCODER_CHANNELS, AUTOENCODER_FACTOR
from edt_core.files.place_names import typed_path
from edt_core.network.hub import HUB_ID
from pipelines.setup.autoencoder_facts import published_facts
from pipelines.setup.hardware import Hardware

if TYPE_CHECKING:
    from edt_core.data.inspection import Inspection

FIT = "fit"  # the answer for an autoencoder that is fitted on the images
SIZES = (32, 64, 128, 256, 512)
_CPU_SIZES = (32, 64)
_FEW_IMAGES = 1000
_HARDWARE = re.compile(r"cpu|gpu(?:-([1-9]\d*))?")
_ROOM = 0.8  # of a GPU's memory for the estimate; kernels and libraries use the rest


@dataclass(frozen=True)
class Images:
    """The images at a path: layout, numbers, and the shorter side in pixels of some of them."""

    path: str
    kind: str
    images: int
    classes: int
    sides: tuple[int, ...]
    remarks: tuple[str, ...] = ()
    allow_empty_classes: bool = False
    inspection: "Inspection | None" = None

    @property
    def turned(self) -> int:
        """The number of inspected images with an EXIF orientation that is not upright."""
        return 0 if self.inspection is None else self.inspection.turned

    @property
    def side(self) -> int:
        """The median shorter side; 0 if no image is readable."""
        return int(np.median(self.sides)) if self.sides else 0

    def __str__(self) -> str:
        sides = f", about {self.side} px" if self.sides else ", none of the inspected ones is readable"
        extent = "" if self.inspection is None else f"; {self.inspection.extent} inspected"
        return f"{self.images:,} images of {self.classes} classes ({self.kind}){sides}{extent}"


@dataclass(frozen=True)
class Answers:
    """The answers. `gpus` 0 means CPUs only, `autoencoder` None fits one, `inception` None means no FID."""

    images: Images
    name: str
    image_size: int
    gpus: int
    model: str
    autoencoder: str | None = None
    inception: str | None = None


def look_at(path: str, allow_empty_classes: bool = False) -> Images:
    """List the images at a path or URI and decode them, or some. Raises UserError if there are none to train on."""
    from edt_core.config import SourceConfig
    from edt_core.data.inspection import inspect
    from edt_core.data.sources import detect_kind, list_source, remarks
    from edt_core.data.sources.places import locate
    from edt_core.progress import CollectedWarnings
    from edt_core.store.folder import Folder

    if not path.strip():
        raise UserError("the path is empty; use a folder that contains <class>/<image>, an archive, or a URI")
    folder = Folder.at(path)
    is_pattern = any(mark in path for mark in "*?[{") and not (folder.local and folder.local.exists())
    place = path if is_pattern or folder.local is None else folder.uri
    kind = detect_kind(locate(place))
    notes = CollectedWarnings()
    fields = {"kind": kind, "path": place, "allow_empty_classes": allow_empty_classes}
    listing = list_source(SourceConfig.model_validate(fields), notes)
    inspection = inspect(listing)
    texts = (*notes.warnings, *remarks(listing))
    sides = inspection.sides
    return Images(place, kind, len(listing), len(listing.classes), sides, texts, allow_empty_classes, inspection)


def suggested_size(images: Images, gpus: int) -> int:
    """The largest usual size that most images reach; a small one on CPUs."""
    sizes = SIZES if gpus else _CPU_SIZES
    return max((size for size in sizes if size <= images.side), default=sizes[0])


def parse_hardware(text: str) -> int:
    """The number of GPUs in `cpu`, `gpu` or `gpu-8`. Raises UserError for other text."""
    if not (match := _HARDWARE.fullmatch(text.strip().lower())):
        raise UserError(
            f"the hardware is {text!r}; use cpu, gpu (one GPU), or gpu-N with the number of GPUs, such as gpu-8"
        )
    return 0 if match[0] == "cpu" else int(match[1] or 1)


def hardware_name(gpus: int) -> str:
    """The text from which `parse_hardware` gets this number of GPUs."""
    return "cpu" if not gpus else "gpu" if gpus == 1 else f"gpu-{gpus}"


def suggested_model(images: Images, gpus: int) -> str:
    """A tiny model on CPUs; on GPUs, a larger one for more GPUs and more images."""
    if not gpus:
        return "EDT-Tiny/2"
    if images.images < 50 * _FEW_IMAGES or gpus == 1:
        return "EDT-S/2"
    return "EDT-XL/2" if gpus >= 8 and images.images >= 500 * _FEW_IMAGES else "EDT-B/2"


def suggested_autoencoder(image_size: int, gpus: int) -> str:
    """A published autoencoder with GPUs and images that are large enough for its factor, otherwise a fitted one."""
    return AUTOENCODER if gpus and image_size >= 128 else FIT


def suggested_name(path: str) -> str:
    """A name for the pipeline after the folder of its images."""
    words = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in re.split(r"[/\\]", path)]
    parts = [word for word in words if word and word not in ("train", "images", "data")]
    return re.sub(r"-(tar|parquet)$", "", parts[-1])[:40].strip("-") if parts else "mine"


def check_name(name: str) -> str:
    """A valid pipeline name, also used for the MLflow experiment and in the model's name. Raises UserError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}", name):
        raise UserError(
            f"the name is {name!r}; use at most 61 letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return name


def check_size(text: str) -> int:
    """An image side in pixels that autoencoders and models support. Raises UserError."""
    if not text.strip().isdecimal() or not 32 <= int(text) <= 4096 or int(text) % 32:
        raise UserError(
            f"the image size is {text!r}; use a multiple of 32 from 32 to 4096, such as {', '.join(map(str, SIZES))}"
        )
    return int(text)


def check_model(name: str) -> str:
    """The name of an existing model, given in upper or lower case. Raises UserError."""
    from edt_core.models import DIFFUSION_NAMES, MODEL_NAMES
    from edt_core.models.zoo import unknown_model

    model = {known.lower(): known for known in MODEL_NAMES}.get(name.strip().lower())
    if model is None:
        raise UserError(unknown_model(name))
    if model not in DIFFUSION_NAMES:
        raise UserError(
            f"the model is {model}, which is trained on codes, but this wizard writes configurations of diffusion "
            "models; choose one of them, or write the configuration as in docs/models.md, MaskGIT"
        )
    return model


def models_text() -> str:
    """The names of the diffusion models, by family: `EDT-S/2, EDT-B/2; DiT-S/2, DiT-B/2`."""
    from itertools import groupby

    from edt_core.models import DIFFUSION_NAMES

    families = groupby(DIFFUSION_NAMES, lambda name: name.partition("-")[0])
    return "; ".join(", ".join(names) for _, names in families)


def check_autoencoder(text: str, image_size: int, model: str) -> str | None:
    """A published autoencoder, or None to fit one. Raises UserError if the model cannot use its latents."""
    from edt_core.models import model_config

    if not text.strip():
        raise UserError(f"the autoencoder is empty; use a hub id, a folder, models:/NAME@ALIAS, or {FIT!r}")
    published = None if text == FIT else text
    factor, channels = latents_of(published, image_size)
    try:
        model_config(model, image_size, autoencoder_factor=factor, latent_channels=channels)
    except ValueError as error:
        raise UserError(f"{model} does not fit: {error} Or use another autoencoder ({FIT!r}).") from error
    return published


def notes(answers: Answers, machine: Hardware) -> list[str]:
    """Warnings about answers that are possible but doubtful."""
    remarks = list(answers.images.remarks)
    if (inspection := answers.images.inspection) is not None:
        from pipelines.setup.photos import remarks_on

        remarks += map(str, remarks_on(inspection, PreprocessConfig(rotate_by_exif=bool(inspection.turned))))
        if inspection.turned:
            remarks.append(
                f"{inspection.turned:,} of {inspection.inspected:,} photos have an EXIF orientation: rotate_by_exif is "
                "true in the file, so that all are upright. Published numbers are without rotation"
            )
    if answers.images.images < _FEW_IMAGES:
        remarks.append(f"{answers.images.images} images are few: any model memorises them")
    if answers.images.sides and answers.image_size > answers.images.side:
        remarks.append(
            f"most images are smaller than {answers.image_size} px ({answers.images.side}): they are enlarged"
        )
    if not answers.gpus and answers.model.rpartition("-")[2] != "Tiny/2":
        remarks.append(f"{answers.model} on CPUs takes weeks; EDT-Tiny/2 is made for CPUs")
    if answers.gpus > len(machine.gpus):
        remarks.append(
            f"this machine has {len(machine.gpus)} GPUs of the {answers.gpus}: run it on a cluster with that many"
        )
    if answers.autoencoder is not None and _known_latents(answers.autoencoder) is None:
        remarks.append(
            f"the configuration of {answers.autoencoder} cannot be read here: factor {AUTOENCODER_FACTOR} and "
            f"{AUTOENCODER_CHANNELS} channels are assumed. Correct both fields under `autoencoder:` if it has others"
        )
    return remarks


def config_text(answers: Answers, machine: Hardware, file: str) -> str:
    """The configuration as commented YAML for `load_config`."""
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
    """Text as a YAML scalar, quoted if necessary."""
    import yaml

    return str(yaml.safe_dump(value, width=math.inf, allow_unicode=True)).removesuffix("\n").removesuffix("\n...")


def _values(answers: Answers, machine: Hardware) -> dict[str, Any]:
    """The values of the template."""
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
        "turned": images.turned,
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
    """Image side / latent side, and latent channels, of a published autoencoder or a fitted one (None).

    The factor of a fitted one keeps detail of small images. A published one whose configuration cannot be read here
    gets the values of the papers' autoencoder. Raises UserError for a local folder that is not supported.
    """
    if autoencoder is not None:
        return _known_latents(autoencoder) or (AUTOENCODER_FACTOR, AUTOENCODER_CHANNELS)
    if image_size >= 256 and image_size % 64 == 0:
        return 8, 4
    return (2 if image_size <= 32 else 4), 4


@cache
def _known_latents(autoencoder: str) -> tuple[int, int] | None:
    """Factor and channels of a published autoencoder; None if its configuration cannot be read here."""
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
    """Dimensions of the classifier's features: fewer than images, because their covariance needs full rank."""
    return next((dim for dim in (64, 32, 16, 8, 4) if images >= 2 * dim), 2)


def _cpu_recipe(answers: Answers) -> dict[str, Any]:
    """The settings of docs/results.md, which take minutes on two cores."""
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
    """The paper's recipe, with fewer steps for fewer images than in ImageNet."""
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
    """The largest half, quarter and so on of a worker's share that fits on a GPU; None if the whole share fits.

    Also None for GPUs of other machines, whose memory is unknown.
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
        fields = {"micro_batch_size": samples, "precision": precision, "masked_loss": masked, "use_gpu": True}
        train = TrainConfig.model_validate({"model": answers.model, **fields})
        return estimate(train, network, answers.images.images).memory

    while micro > 1 and needs(micro) > _ROOM * machine.gpu_memory:
        micro = math.ceil(micro / 2)
    return micro if micro < share else None


def summary(answers: Answers) -> Mapping[str, str]:
    """A short summary of the answers."""
    return {
        "images": str(answers.images),
        "model": f"{answers.model} at {answers.image_size} px on {hardware_name(answers.gpus)}",
        "autoencoder": answers.autoencoder or "fitted on the images",
        "compared by": "FID (Inception)"
        if answers.inception
        else "fd_classifier, in a classifier fitted on the images",
    }
