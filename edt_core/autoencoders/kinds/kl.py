"""AutoencoderKL of diffusers (Rombach et al. 2022): the encoder returns a normal distribution of latents."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from edt_core.autoencoders.kinds.kind import AutoencoderKind, Settings, differing_levels

_LEVELS = ("block_out_channels", "down_block_types", "up_block_types")


def _encode(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    posterior = model.encode(images).latent_dist
    return posterior.mean, posterior.std


def _problems(_settings: Settings, config: Settings) -> Iterator[str]:
    yield from differing_levels({key: config[key] for key in _LEVELS if key in config})


KL = AutoencoderKind(
    class_name="AutoencoderKL",
    encode=_encode,
    downsample_factor=lambda settings: 2 ** (len(settings["block_out_channels"]) - 1),
    problems=_problems,
)
