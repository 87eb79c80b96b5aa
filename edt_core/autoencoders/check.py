"""Checks of a diffusers autoencoder's folder and configuration before its weights are loaded."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edt_core.autoencoders.kinds import KINDS, supported
from edt_core.data.scale import SCALE_FIELDS
from edt_core.errors import UserError
from edt_core.files.small_files import read_json_object

_LARGEST = 1e30  # bound of a scale's values; integers in JSON are unbounded
_PIPELINE_INDEX, _CONFIG = "model_index.json", "config.json"


def check_folder(folder: Path) -> None:
    """Raise UserError, with the remedy, for a local folder of a diffusers pipeline or with only pickled weights."""
    if not (folder / _CONFIG).is_file():
        if (folder / _PIPELINE_INDEX).is_file():
            raise UserError(_pipeline_folder(folder))
        return
    name, pickles = _class_name(folder), sorted(path.name for path in folder.glob("*.bin"))
    if name in KINDS and pickles and not any(folder.glob("*.safetensors")):
        raise UserError(pickled(str(folder), name, f"{folder}-safetensors", f"{pickles[0]} is"))


def _pipeline_folder(folder: Path) -> str:
    subfolders = [path for path in sorted(folder.iterdir()) if _class_name(path) in KINDS]
    first = sorted(subfolders, key=lambda path: path.name != "vae")[:1]
    remedy = (
        f"use its {first[0].name} subfolder: {first[0]}"
        if first
        else f"use the vae subfolder of a pipeline with an {supported('or')}"
    )
    return f"{folder} is the folder of a diffusers pipeline ({_PIPELINE_INDEX}), not of an autoencoder; {remedy}"


def _class_name(folder: Path) -> str:
    """The diffusers class in a folder's config.json; "" if there is none."""
    with suppress(OSError, ValueError):
        return str(read_json_object(folder / _CONFIG).get("_class_name", ""))
    return ""


def pickled(location: str, class_name: str, target: str, subject: str = "its weights are") -> str:
    """The message for weights that are not safetensors, with the command that converts them."""
    package = "diffusers" if KINDS[class_name].own_class is None else "edt_core.pipeline"
    code = (
        f"from {package} import {class_name}; "
        f"{class_name}.from_pretrained({location!r}, use_safetensors=False).save_pretrained({target!r})"
    )
    return (
        f"{location} has no safetensors weights: {subject} a pickle, which can run code when it is loaded. If you "
        f'trust its source, convert it and use {target}:\n  python -c "{code}"'
    )


def hub_pipeline(hub_id: str) -> str:
    """The message for a hub id of a diffusers pipeline."""
    return (
        f"{hub_id} is a diffusers pipeline ({_PIPELINE_INDEX}), not an autoencoder; use its vae subfolder: "
        f"hf download {hub_id} --include 'vae/*' --local-dir FOLDER, and use FOLDER/vae"
    )


def check_config(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a diffusers configuration, including its class's defaults.

    Raises UserError with each setting that is not supported, or that the class itself would ignore.
    """
    import inspect

    import diffusers

    name = config.get("_class_name")
    if name not in KINDS:
        problem = f"it is {name}" if name else f"its {_CONFIG} has no diffusers class (_class_name)"
        raise UserError(f"{where} cannot be used as autoencoder: {problem}; {supported('and')} are supported")
    kind = KINDS[name]
    arguments = inspect.signature(kind.model_class.__init__).parameters
    defaults = {key: argument.default for key, argument in arguments.items() if key != "self"}
    unknown = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and value is not None and key not in {*defaults, *kind.also_saved}
    }
    settings = {**defaults, **config}
    problems = [
        *(f"{key} is {value!r}, which diffusers {diffusers.__version__} ignores" for key, value in unknown.items()),
        *_channel_problems(settings, kind.channels_setting),
        *kind.problems(settings, config),
        *_scale_problems(settings, settings[kind.channels_setting]),
    ]
    if problems:
        raise UserError(
            f"{where} cannot be used as autoencoder: in its {_CONFIG} {'; '.join(problems)}. Use another autoencoder, "
            f"or correct {_CONFIG} in a local copy if the setting does not belong there"
        )
    return settings


def _channel_problems(settings: Mapping[str, Any], latent_channels: str) -> Iterator[str]:
    """Problems of the channels of images, and of the latent channels, whose setting is named `latent_channels`."""
    for key in ("in_channels", "out_channels"):
        if settings.get(key, 3) != 3:
            yield f"{key} is {settings[key]!r}, but images have 3 channels"
    if not isinstance(settings[latent_channels], int) or settings[latent_channels] < 1:
        yield f"{latent_channels} is {settings[latent_channels]!r}, not a number of channels"


def _scale_problems(settings: Mapping[str, Any], channels: Any) -> Iterator[str]:
    """Problems of scaling_factor, shift_factor, latents_mean and latents_std (see `edt_core.data.scale`)."""
    factor: Any
    factor, shift, mean, std = (settings.get(name) for name in SCALE_FIELDS)
    if not _is_number(factor) or factor <= 0:
        yield f"scaling_factor is {factor!r}, not a positive number"
    if shift is not None and not _is_number(shift):
        yield f"shift_factor is {shift!r}, not a number"
    if (mean is None) != (std is None):
        present, missing = ("latents_std", "latents_mean") if mean is None else ("latents_mean", "latents_std")
        yield f"{present} is set without {missing}"
    for key, values, positive in (("latents_mean", mean, False), ("latents_std", std, True)):
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != channels or not all(map(_is_number, values)):
            yield f"{key} is {values!r}, not one number for each of the {channels} latent channels"
        elif positive and min(values) <= 0:
            yield f"{key} has the value {min(values)!r}, but standard deviations are above 0"
    if mean is not None and shift:
        yield f"shift_factor is {shift!r} and latents_mean is set too: only one of them can centre the latents"


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_LARGEST < value < _LARGEST  # False for NaN
