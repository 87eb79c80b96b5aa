"""AutoencoderFSQ, a class of this package: deterministic, its latents are the values of codes (arXiv 2309.15505)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from edt_core.autoencoders.kinds.kind import AutoencoderKind, Settings, differing_levels
from edt_core.models.families.codes import LEVELS


def _encode(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    values = model.encode(images)
    return values, torch.zeros_like(values)


def _problems(settings: Settings, _config: Settings) -> Iterator[str]:
    """Other codes than those of the models, and a scale, which would change their values."""
    if list(settings["levels"]) != list(LEVELS):
        yield f"levels is {settings['levels']!r}, but only {list(LEVELS)} is supported"
    if settings["latent_channels"] != len(LEVELS):
        yield f"latent_channels is {settings['latent_channels']!r}, but the codes have {len(LEVELS)} channels"
    if settings["scaling_factor"] != 1:
        yield f"scaling_factor is {settings['scaling_factor']!r}, but values of codes are not scaled"
    yield from differing_levels({"block_out_channels": settings["block_out_channels"]})


def _class() -> type[Any]:
    from edt_core.autoencoders.fsq import AutoencoderFSQ

    return AutoencoderFSQ


FSQ = AutoencoderKind(
    class_name="AutoencoderFSQ",
    encode=_encode,
    downsample_factor=lambda settings: 2 ** (len(settings["block_out_channels"]) - 1),
    problems=_problems,
    own_class=_class,
    levels=LEVELS,
)
