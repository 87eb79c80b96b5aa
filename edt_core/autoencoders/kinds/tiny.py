"""AutoencoderTiny of diffusers (TAESD): small and deterministic."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from edt_core.autoencoders.kinds.kind import AutoencoderKind, Settings, differing_levels

_LEVELS = ("encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks")


def _encode(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    latents = model.encode(images).latents
    return latents, torch.zeros_like(latents)


def _problems(settings: Settings, _config: Settings) -> Iterator[str]:
    """Settings for which the decoder does not double the side as often as the encoder halves it."""
    if settings["upsampling_scaling_factor"] != 2:
        yield f"upsampling_scaling_factor is {settings['upsampling_scaling_factor']!r}, but only 2 is supported"
    yield from differing_levels({key: settings[key] for key in _LEVELS})


TINY = AutoencoderKind(
    class_name="AutoencoderTiny",
    encode=_encode,
    downsample_factor=lambda settings: 2 ** (len(settings["encoder_block_out_channels"]) - 1),
    problems=_problems,
    also_saved=frozenset({"block_out_channels"}),
)
