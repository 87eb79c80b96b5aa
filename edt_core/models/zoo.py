"""The named models: EDT, DiT and MDTv2 in their papers' sizes, tiny ones for small latents, and the placement of AMM.

The depth of the decoder of MDTv2-B and -L is not in its authors' code; see `_DECODE_DEPTHS`.

Legend: `cfg_scale` is the classifier-free guidance scale (1 means no guidance); `image_size` is in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edt_core.errors import UserError
from edt_core.models.amm_placements import AMM_PLACEMENTS, LARGE_IMAGE_SIZE
from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import AmmKernel, DiTConfig, EDTConfig, MDTv2Config, ModelConfig
from edt_core.models.families.dit import DiT
from edt_core.models.families.edt import EDT
from edt_core.models.families.mdtv2 import MDTv2

_MODELS: dict[type[ModelConfig], type[DiffusionTransformer]] = {EDTConfig: EDT, DiTConfig: DiT, MDTv2Config: MDTv2}


@dataclass(frozen=True)
class _Size:
    """What a name means: `numbers` of its configuration."""

    config: type[ModelConfig]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    autoencoder_factor: int = 8


_EDT: dict[str, _Size] = {
    "EDT-S/2": _Size(
        EDTConfig,
        {"depths": (2, 2, 2, 3, 3), "dims": (312, 416, 520, 416, 312), "num_heads": (6, 8, 10, 8, 6)},
    ),
    "EDT-B/2": _Size(
        EDTConfig,
        {"depths": (2, 2, 2, 3, 3), "dims": (624, 832, 1040, 832, 624), "num_heads": (12, 16, 20, 16, 12)},
    ),
    "EDT-XL/2": _Size(
        EDTConfig,
        {
            "depths": (6, 4, 4, 7, 7),
            "dims": (936, 1248, 1560, 1248, 936),
            "num_heads": (18, 24, 30, 24, 18),
            "mid_mask_block": 4,
        },
    ),
    "EDT-Tiny/2": _Size(
        EDTConfig,
        {"depths": (2, 1, 1, 1, 2), "dims": (64, 80, 96, 80, 64), "num_heads": (4, 5, 6, 5, 4)},
        autoencoder_factor=4,
    ),
}

# Depth, width and heads: table 1 of arXiv 2212.09748, which MDTv2 takes over.
_WIDTHS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
# Blocks of MDTv2's decoder. The configurations of github.com/sail-sg/MDT do not set the number: it is an option of
# training, 6 in the authors' command for S and 4 in the one for XL. For B and L no number is in their code; the
# option's default, 4, stands in for it.
_DECODE_DEPTHS = {"S": 6, "B": 4, "L": 4, "XL": 4}


def _of_one_width(
    config: type[ModelConfig], width: tuple[int, int, int], autoencoder_factor: int = 8, **numbers: int
) -> _Size:
    depth, dim, num_heads = width
    return _Size(config, {"depth": depth, "dim": dim, "num_heads": num_heads, **numbers}, autoencoder_factor)


_SIZES: dict[str, _Size] = {
    **_EDT,
    **{
        f"DiT-{size}/{patch}": _of_one_width(DiTConfig, width, patch_size=patch)
        for size, width in _WIDTHS.items()
        for patch in (2, 4, 8)
    },
    "DiT-Tiny/2": _of_one_width(DiTConfig, (6, 60, 5), 4),
    **{
        f"MDTv2-{size}/2": _of_one_width(MDTv2Config, width, decode_depth=_DECODE_DEPTHS[size])
        for size, width in _WIDTHS.items()
    },
    "MDTv2-Tiny/2": _of_one_width(MDTv2Config, (6, 56, 4), 4, decode_depth=2),
}

MODEL_NAMES: tuple[str, ...] = tuple(_SIZES)


def _size(name: str) -> _Size:
    if name not in _SIZES:
        raise ValueError(f"Unknown model {name!r}. Known models: {', '.join(MODEL_NAMES)}.")
    return _SIZES[name]


def model_config(
    name: str,
    image_size: int = 256,
    num_classes: int = 1000,
    amm_blocks: Sequence[int] = (),
    *,
    autoencoder_factor: int | None = None,
    latent_channels: int = 4,
    amm_kernel: AmmKernel | None = None,
) -> ModelConfig:
    """The configuration of a named model for images of `image_size` pixels.

    Args:
        name: one of `MODEL_NAMES`.
        image_size: side of the images in pixels; the latents' side is `image_size / autoencoder_factor`.
        num_classes: number of classes; the label `num_classes` itself is the null class of guidance.
        amm_blocks: blocks whose attention is modulated in evaluation, see `paper_amm_blocks`.
        autoencoder_factor: pixels a latent covers in each direction; 8 but for Tiny, 4.
        latent_channels: channels of the latents.
        amm_kernel: how attention falls with distance; the paper's for the resolution if None.

    Raises:
        ValueError: an unknown name, an image size that does not fit, or an AMM block that does not exist.
    """
    size = _size(name)
    factor = size.autoencoder_factor if autoencoder_factor is None else autoencoder_factor
    if image_size % factor:
        patch, depths = size.numbers.get("patch_size", 2), size.numbers.get("depths", ())
        raise ValueError(
            f"{name}: images of {image_size} pixels do not divide by the autoencoder's factor {factor}. "
            f"Use a multiple of {factor * patch * 2 ** (len(depths) // 2)}."
        )
    if amm_kernel is None:
        amm_kernel = "cos" if image_size >= LARGE_IMAGE_SIZE else "exp_cos"
    return size.config(
        name=name,
        latent_size=image_size // factor,
        in_channels=latent_channels,
        autoencoder_factor=factor,
        num_classes=num_classes,
        amm_blocks=tuple(amm_blocks),
        amm_kernel=amm_kernel,
        **size.numbers,
    )


def build_model(config: ModelConfig) -> DiffusionTransformer:
    """A freshly initialised model of any configuration."""
    return _MODELS[type(config)](config)


def create_model(
    name: str,
    image_size: int = 256,
    num_classes: int = 1000,
    amm_blocks: Sequence[int] = (),
    *,
    autoencoder_factor: int | None = None,
    latent_channels: int = 4,
    amm_kernel: AmmKernel | None = None,
) -> DiffusionTransformer:
    """A freshly initialised model by name; the arguments, and what is raised, are those of `model_config`."""
    return build_model(
        model_config(
            name,
            image_size,
            num_classes,
            amm_blocks,
            autoencoder_factor=autoencoder_factor,
            latent_channels=latent_channels,
            amm_kernel=amm_kernel,
        )
    )


def paper_amm_blocks(name: str, cfg_scale: float, image_size: int = 256) -> tuple[int, ...]:
    """Blocks whose attention EDT's authors modulate in a model, for a guidance scale and an image size in pixels.

    They are published for EDT-S, -B and -XL, DiT-S/2 and -XL/2, and MDTv2-S: `edt_core.models.amm_placements`.

    Raises:
        UserError: no placement is published for the model, the guidance scale and the image size.
        ValueError: an unknown name.
    """
    _size(name)
    for placement in AMM_PLACEMENTS:
        if placement.fits(name, cfg_scale, image_size):
            return placement.blocks
    known = "; ".join(str(placement) for placement in AMM_PLACEMENTS if placement.model == name)
    models = ", ".join(dict.fromkeys(placement.model for placement in AMM_PLACEMENTS))
    raise UserError(
        f"amm_blocks is 'paper', but no placement is published for {name} at {image_size} px with cfg_scale "
        f"{cfg_scale:g}. Published for {f'{name}: {known}' if known else f'other models only: {models}'}. Search for a "
        "placement with `edt amm-search` and use amm_blocks 'model', give block numbers, or turn AMM off "
        "(amm_blocks [], in a sweep amm=off)."
    )


def has_paper_amm_blocks(name: str, image_size: int = 256) -> bool:
    """Whether a placement is published for a model and an image size in pixels, at one guidance scale at least."""
    large = image_size >= LARGE_IMAGE_SIZE
    return any((placement.model, placement.large) == (name, large) for placement in AMM_PLACEMENTS)
