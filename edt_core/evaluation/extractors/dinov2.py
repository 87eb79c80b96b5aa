"""DINOv2 as a feature network, by the convention of FD-DINOv2 (Stein et al. 2023, Karras et al. 2024).

Legend: N images, S image side in pixels, D features, G x G patches.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edt_core.evaluation.extractors.pixels import exact_fp32, images_on, on_host, standardised
from edt_core.evaluation.extractors.pretrained import load_pretrained
from edt_core.evaluation.extractors.spec import ExtractorSpec

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in 0..1


def to_dinov2_range(images: Tensor) -> Tensor:
    """float32 [N, 3, 224, 224] of uint8 [N, 3, S, S]: bicubic with antialiasing, then ImageNet's mean and std.

    Values outside 0..255 are not clipped, as in the code of Karras et al.
    """
    resized = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return standardised(resized, MEAN, STD)


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + grid², D] from [1, 1 + G², D], resized as by DINOv2's authors, class token unchanged.

    The authors' code scales by (grid + 0.1) / G (facebookresearch/dinov2, dinov2/models/vision_transformer.py),
    transformers to `grid` exactly. The features differ; published values of FD-DINOv2 come from the authors' code.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    patches = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class Dinov2:
    """The class token after the last layer norm, of images at 224 x 224 pixels."""

    space = "dinov2"

    def __init__(self, model: Any, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        embeddings = model.embeddings
        positions = resized_positions(embeddings.position_embeddings.detach(), SIDE // model.config.patch_size)
        embeddings.position_embeddings = nn.Parameter(positions)
        self.model = model.to(self.device).eval().requires_grad_(False)

    @classmethod
    def load(cls, location: str | Path, device: torch.device | str = "cpu") -> "Dinov2":
        """Load from a folder or hub id in the transformers format, with weights in safetensors.

        Raises UserError if transformers or the model is missing, and for a model of another kind.
        """
        return cls(load_pretrained(SPEC, location, "Dinov2Model", ("dinov2",)), device)

    def __call__(self, pixels: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        """uint8 [N, S, S, 3] -> features [N, D]; D is 1024 for DINOv2 large."""
        images = images_on(self.device, pixels)
        with exact_fp32(self.device):
            tokens = self.model(pixel_values=to_dinov2_range(images)).last_hidden_state
            return on_host({"features": tokens[:, 0]})


class PatchTokens:
    """The tokens of patches after the last layer norm, of images at 224 x 224 pixels, as REPA's code computes them.

    Unlike for the class token of FD-DINOv2, images are resized without antialiasing after they are standardised, and
    position embeddings to the grid exactly, with antialiasing (github.com/sihyun-yu/REPA, train.py and utils.py).
    """

    def __init__(self, model: Any, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        embeddings = model.embeddings
        grid = SIDE // model.config.patch_size
        embeddings.position_embeddings = nn.Parameter(exact_positions(embeddings.position_embeddings.detach(), grid))
        self.model = model.to(self.device).eval().requires_grad_(False)

    @classmethod
    def load(cls, location: str | Path, device: torch.device | str = "cpu") -> "PatchTokens":
        """As `Dinov2.load`."""
        return cls(load_pretrained(SPEC, location, "Dinov2Model", ("dinov2",)), device)

    def __call__(self, pixels: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        """uint8 [N, S, S, 3] -> tokens [N, G², D], row by row; G is 16 and D is 768 for DINOv2 base."""
        images = standardised(images_on(self.device, pixels).float(), MEAN, STD)
        with exact_fp32(self.device):
            resized = F.interpolate(images, (SIDE, SIDE), mode="bicubic")
            return on_host({"tokens": self.model(pixel_values=resized).last_hidden_state[:, 1:]})


def exact_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + grid², D] from [1, 1 + G², D], resized to the grid exactly, with antialiasing."""
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    patches = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


SPEC = ExtractorSpec(
    name="dinov2",
    title="DINOv2",
    help="DINOv2 for fd_dinov2: a transformers folder or hub id, or MLflow URI",
    suggestion="--dinov2-weights",
    load=Dinov2.load,
    load_tokens=PatchTokens.load,
    source="the weights of DINOv2 (facebook/dinov2-large of the Hugging Face hub, the model of "
    "github.com/facebookresearch/dinov2, with config.json and model.safetensors); put its folder where this machine "
    "can read it, or use its hub id if this machine can reach the hub",
    is_folder=True,
    package="transformers",
    extra="dinov2",
    dimension_field="hidden_size",
    values_per_sample=1024,
    always_recorded=True,
)
