"""CLIP's image encoder as a feature network, by the convention of CMMD (Jayasumana et al. 2024, arXiv 2401.09603).

Legend: N images, S image side in pixels, I side of the network's input, D features.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edt_core.errors import UserError
from edt_core.evaluation.extractors.pixels import exact_fp32, images_on, on_host, standardised
from edt_core.evaluation.extractors.pretrained import load_pretrained
from edt_core.evaluation.extractors.spec import FEATURE_METRICS, ExtractorSpec
from edt_core.files.small_files import read_json_object
from edt_core.network.hub import hub_is_away

_PREPROCESSOR = "preprocessor_config.json"
_MODEL_TYPES = ("clip", "clip_vision_model")  # a whole CLIP, of which the image encoder is used, or only the encoder

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class ClipInput:
    """The network's preprocessing: images of `side` pixels, standardised by `mean` and `std` (levels 0..1, by channel).

    The defaults are OpenAI's, for folders without a preprocessor_config.json.
    """

    side: int
    mean: Triple = (0.48145466, 0.4578275, 0.40821073)
    std: Triple = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def of(cls, side: int, settings: dict[str, Any]) -> "ClipInput":
        """The preprocessing with the mean and std of `settings`. Raises ValueError for another side or bad values."""
        crop = settings.get("crop_size", side)
        if any(length != side for length in (crop.values() if isinstance(crop, dict) else [crop])):
            raise ValueError(f"{_PREPROCESSOR} has crop_size {crop}, but the network takes {side} x {side} pixels")
        mean, std = (
            _triple(settings, name, default) for name, default in (("image_mean", cls.mean), ("image_std", cls.std))
        )
        if min(std) <= 0:
            raise ValueError(f"{_PREPROCESSOR} has image_std {list(std)}; values must be above 0")
        return cls(side, mean, std)

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess uint8 [N, 3, S, S] -> float32 [N, 3, I, I]."""
        return standardised(pillow_bicubic(images, self.side), self.mean, self.std)


def pillow_bicubic(images: Tensor, side: int) -> Tensor:
    """Levels 0..255, float32 [N, C, side, side], of uint8 [N, C, S, S], resized like Pillow's bicubic filter.

    The authors' code uses Pillow, which resizes rows, then columns, with antialiasing, and rounds to integer levels
    after each. Resized in both directions at once, a fifth of the levels differ from Pillow's; this way, 3 of 10,000
    differ, by one level.
    """
    levels = images.float()
    for size in ((images.shape[2], side), (side, side)):
        if size != levels.shape[2:]:
            resized = F.interpolate(levels, size, mode="bicubic", antialias=True)
            levels = (resized + 0.5).floor_().clamp_(0, 255)
    return levels


def _triple(settings: dict[str, Any], name: str, default: Triple) -> Triple:
    values = settings.get(name, default)
    if not (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(value, float | int) and math.isfinite(value) for value in values)
    ):
        raise ValueError(f"{_PREPROCESSOR} has {name} {values}; three numbers are needed")
    return (float(values[0]), float(values[1]), float(values[2]))


class Clip:
    """The projected embedding of an image, of length 1."""

    space = "clip"

    def __init__(self, model: Any, preprocess: ClipInput, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.preprocess = preprocess

    @classmethod
    def load(cls, location: str | Path, device: torch.device | str = "cpu") -> "Clip":
        """Load from a folder or hub id in the transformers format, with weights in safetensors.

        Raises UserError if transformers or the model is missing, and for a model of another kind.
        """
        model = load_pretrained(SPEC, location, "CLIPVisionModelWithProjection", _MODEL_TYPES)
        try:
            preprocess = ClipInput.of(model.config.image_size, _preprocessor(location))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"no CLIP at {location}: {reason}. Needed are {SPEC.needed}") from error
        return cls(model, preprocess, device)

    def __call__(self, pixels: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        """uint8 [N, S, S, 3] -> features [N, D] of length 1; D is 768 for CLIP large at 336 pixels."""
        images = images_on(self.device, pixels)
        with exact_fp32(self.device):
            embeddings = self.model(pixel_values=self.preprocess(images)).image_embeds
            return on_host({"features": embeddings / embeddings.norm(dim=1, keepdim=True)})


def _preprocessor(location: str | Path) -> dict[str, Any]:
    """The settings of a model's preprocessor; empty if the model has no file of them."""
    if (folder := Path(location)).is_dir():
        return read_json_object(folder / _PREPROCESSOR) if (folder / _PREPROCESSOR).is_file() else {}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return read_json_object(
            Path(hf_hub_download(str(location), _PREPROCESSOR, local_files_only=hub_is_away(location)))
        )
    except LocalEntryNotFoundError:
        raise  # offline: the hub may have the file
    except EntryNotFoundError:
        return {}


SPEC = ExtractorSpec(
    name="clip",
    title="CLIP",
    help="CLIP's image encoder for cmmd and fd_clip: a transformers folder or hub id, or MLflow URI",
    suggestion="--clip-weights",
    load=Clip.load,
    source="the weights of CLIP (openai/clip-vit-large-patch14-336 of the Hugging Face hub, with config.json and "
    "model.safetensors); put its folder where this machine can read it, or use its hub id if this machine can reach "
    "the hub",
    is_folder=True,
    package="transformers",
    extra="clip",
    dimension_field="projection_dim",
    values_per_sample=768,
    metrics=(*FEATURE_METRICS, "cmmd"),
)
