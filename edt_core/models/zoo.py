"""The named models: all families in their papers' sizes, tiny ones for small latents, and their AMM placements.

Legend: `cfg_scale` is the classifier-free guidance scale (1 means no guidance); `image_size` is in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from edt_core.errors import UserError
from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import AmmKernel, LatentSizeError, ModelConfig
from edt_core.models.families import FAMILIES
from edt_core.models.families.amm_placements import LARGE_IMAGE_SIZE, AmmPlacement
from edt_core.models.families.family import Family
from edt_core.models.families.overrides import checked_overrides, overrides_of
from edt_core.models.quantized.model import quantize_layers

_FAMILY_OF: dict[str, Family] = {name: family for family in FAMILIES.values() for name in family.sizes}
MODEL_NAMES: tuple[str, ...] = tuple(_FAMILY_OF)
# Of diffusion models, which are trained for any of its objectives, on any latents.
DIFFUSION_NAMES = tuple(name for name, family in _FAMILY_OF.items() if family.config.only_objective is None)
AMM_PLACEMENTS: tuple[AmmPlacement, ...] = tuple(
    placement for family in FAMILIES.values() for placement in family.amm_placements
)


def family_of(name: str) -> Family:
    """The family of a named model. Raises ValueError for an unknown name."""
    if name not in _FAMILY_OF:
        raise ValueError(unknown_model(name))
    return _FAMILY_OF[name]


def unknown_model(name: str) -> str:
    """A message about an unknown name: the nearest ones first, then all."""
    near = get_close_matches(name.upper(), MODEL_NAMES, 2)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return f"Unknown model {name!r}{hint} Known models: {', '.join(MODEL_NAMES)}."


def models_for(latent_size: int) -> tuple[str, ...]:
    """The diffusion models for latents of side `latent_size`."""
    return tuple(name for name in DIFFUSION_NAMES if _fits(name, latent_size))


def _fits(name: str, latent_size: int) -> bool:
    family = family_of(name)
    try:
        family.config(name=name, latent_size=latent_size, **family.sizes[name].numbers)
    except LatentSizeError:
        return False
    return True


def model_config(
    name: str,
    image_size: int = 256,
    num_classes: int = 1000,
    amm_blocks: Sequence[int] = (),
    *,
    autoencoder_factor: int | None = None,
    latent_channels: int = 4,
    amm_kernel: AmmKernel | None = None,
    overrides: Mapping[str, Any] | None = None,
    width: int | None = None,
) -> ModelConfig:
    """The configuration of a named model for images of `image_size` pixels.

    Args:
        name: one of `MODEL_NAMES`.
        image_size: side of the images in pixels; the latents' side is `image_size / autoencoder_factor`.
        num_classes: number of classes; the label `num_classes` itself is the null class of guidance.
        amm_blocks: blocks whose attention is modulated in evaluation, see `paper_amm_blocks`.
        autoencoder_factor: pixels that a latent covers in each direction; None is 8, and 4 for Tiny.
        latent_channels: channels of the latents.
        amm_kernel: how attention decreases with distance; None is the paper's for the resolution.
        overrides: fields of the family's configuration with other values than the named model has.
        width: of the first tokens, see `ModelConfig.with_width`; None is that of the named model.

    Raises:
        ValueError: an unknown name, an image size or width that does not fit, an AMM block that does not exist, or
            fields that the family does not have.
    """
    family = family_of(name)
    size = family.sizes[name]
    overridden = checked_overrides(family, name, overrides or {})
    factor = size.autoencoder_factor if autoencoder_factor is None else autoencoder_factor
    if image_size % factor:
        patch, depths = size.numbers.get("patch_size", 2), size.numbers.get("depths", ())
        raise ValueError(
            f"{name}: the image size of {image_size} pixels is not divisible by the autoencoder's factor {factor}. "
            f"Use a multiple of {factor * patch * 2 ** (len(depths) // 2)}."
        )
    if amm_kernel is None:
        amm_kernel = "cos" if image_size >= LARGE_IMAGE_SIZE else "exp_cos"
    try:
        config = family.config(
            name=name,
            latent_size=image_size // factor,
            in_channels=latent_channels,
            autoencoder_factor=factor,
            num_classes=num_classes,
            amm_blocks=tuple(amm_blocks),
            amm_kernel=amm_kernel,
            **{**size.numbers, **overridden},
        )
    except LatentSizeError as error:
        side = image_size // factor
        fitting = f"Models for {side}x{side}: {', '.join(models_for(side)) or 'none'}."
        raise LatentSizeError(f"{error} {fitting}") from None
    return config if width is None else config.with_width(width)


def chosen_amm_blocks(config: ModelConfig, blocks: Sequence[int] | str, cfg_scale: float) -> tuple[int, ...]:
    """The blocks that a setting means for a model.

    `blocks`: indices; "model" for those of its configuration; "paper" for those published for the guidance scale, see
    `paper_amm_blocks`; or a name of `amm_presets`.

    Raises UserError if there is no such placement for the model.
    """
    if not isinstance(blocks, str):
        return tuple(blocks)
    if blocks == "model":
        return config.amm_blocks
    if blocks == "paper":
        _check_depth(config)
        return paper_amm_blocks(config.name, cfg_scale, config.image_size)
    presets = config.amm_presets
    if blocks not in presets:
        raise UserError(
            f"amm_blocks is {blocks!r}, but {config.name} has no such part; use {', '.join(presets)}, paper, model, or "
            "block numbers"
        )
    return presets[blocks]


def _check_depth(config: ModelConfig) -> None:
    """Raise UserError for a model of another depth than the one of its name, whose placement is published."""
    family = family_of(config.name)
    if family.depth is None:
        return
    field = family.depth.field
    published, own = family.sizes[config.name].numbers[field], getattr(config, field)
    if own != published:
        before, now = (value if isinstance(value, int) else sum(value) for value in (published, own))
        raise UserError(
            f"amm_blocks is 'paper', but placements are published for {config.name} with its {before} blocks, and this "
            f"one has {now} ({field} {own}); list block numbers, search for a placement with `edt amm-search`, or turn "
            "AMM off (amm_blocks [])"
        )


def with_trained_amm(config: ModelConfig, blocks: Sequence[int] | str) -> ModelConfig:
    """The configuration of a model that is trained with AMM in these blocks, which are then its own placement.

    `blocks`: as of `chosen_amm_blocks` without guidance; () for a training without AMM.
    """
    chosen = chosen_amm_blocks(config, blocks, 1.0)
    return replace(config, amm_blocks=chosen, amm_in_training=True) if chosen else config


def overrides_record(config: ModelConfig) -> dict[str, Any]:
    """`{"model_overrides": the fields in which it differs from the model of its name}` for records; empty without."""
    differing = overrides_of(FAMILIES[config.architecture], config)
    return {"model_overrides": differing} if differing else {}


def build_model(config: ModelConfig) -> DiffusionTransformer:
    """A freshly initialised model of any configuration.

    Raises UserError for a quantised one without torchao, or on a machine that cannot compute it.
    """
    model = FAMILIES[config.architecture].model(config)
    if config.quantization is not None:
        quantize_layers(model, config.quantization)
    return model


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
    """A freshly initialised model by name. Arguments and errors are those of `model_config`."""
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
    """Blocks in which EDT's authors modulate attention, for a model, a guidance scale and an image size in pixels.

    Placements are published for EDT-S, -B and -XL, DiT-S/2 and -XL/2, and MDTv2-S (`AMM_PLACEMENTS`).

    Raises:
        UserError: no placement is published for the model, the guidance scale and the image size.
        ValueError: an unknown name.
    """
    published = family_of(name).amm_placements
    for placement in published:
        if placement.fits(name, cfg_scale, image_size):
            return placement.blocks
    own = "; ".join(str(placement) for placement in published if placement.model == name)
    models = ", ".join(dict.fromkeys(placement.model for placement in AMM_PLACEMENTS))
    raise UserError(
        f"amm_blocks is 'paper', but no placement is published for {name} at {image_size} px with cfg_scale "
        f"{cfg_scale:g}. Published for {f'{name}: {own}' if own else f'other models only: {models}'}. Search for a "
        "placement with `edt amm-search` and use amm_blocks 'model', list block numbers, or turn AMM off "
        "(amm_blocks [], in a sweep amm=off)."
    )


def has_paper_amm_blocks(name: str, image_size: int = 256) -> bool:
    """Whether a placement is published for a model and an image size in pixels, at any guidance scale."""
    large = image_size >= LARGE_IMAGE_SIZE
    return any((placement.model, placement.large) == (name, large) for placement in AMM_PLACEMENTS)
