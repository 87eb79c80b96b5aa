"""AutoencoderDC of diffusers (DC-AE, arXiv 2410.10733): deterministic, with factors of 32 to 128 and many channels."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from edt_core.autoencoders.kinds.kind import AutoencoderKind, Settings, differing_levels

_LISTS = ("block_out_channels", "layers_per_block", "qkv_multiscales")
_LISTS_OR_TEXT = ("encoder_block_types", "decoder_block_types", "decoder_norm_types", "decoder_act_fns")


def _encode(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    latents = model.encode(images).latent
    return latents, torch.zeros_like(latents)


def _problems(settings: Settings, _config: Settings) -> Iterator[str]:
    """Levels, layers and channels for which diffusers builds another factor, or fails without a clear message."""
    lists = {f"{side}_{name}": settings[f"{side}_{name}"] for side in ("encoder", "decoder") for name in _LISTS}
    lists |= {name: settings[name] for name in _LISTS_OR_TEXT if not isinstance(settings[name], str)}
    if differing := list(differing_levels(lists)):
        yield from differing
        return
    if len(settings["encoder_block_out_channels"]) < 2:
        yield "there is one level, but at least 2 are needed"
        return
    for side, shortcut in (("encoder", "encoder_out_shortcut"), ("decoder", "decoder_in_shortcut")):
        layers, channels = f"{side}_layers_per_block", f"{side}_block_out_channels"
        if not _are_numbers(settings[layers], 0) or 0 in settings[layers][1:]:
            yield f"{layers} is {settings[layers]!r}, but each level after the first needs at least 1 layer"
        elif not _are_numbers(settings[channels], 1):
            yield f"{channels} is {settings[channels]!r}, not numbers of channels"
        else:
            yield from _indivisible(channels, settings, settings[shortcut])


def _indivisible(name: str, settings: Settings, has_shortcut: bool) -> Iterator[str]:
    """Numbers of channels that shortcuts, between levels and at the latents, cannot average or repeat evenly."""
    channels, latent = settings[name], settings["latent_channels"]
    in_fours = name.startswith("encoder") and settings["downsample_block_type"] == "pixel_unshuffle"
    for before, after in pairwise(channels):
        if 4 * before % after:
            yield f"{name} has {after} after {before}, which does not divide {4 * before}"
        elif in_fours and after % 4:
            yield f"{name} has {after} after {before}, which is not a multiple of 4"
    if has_shortcut and isinstance(latent, int) and latent > 0 and channels[-1] % latent:
        yield f"{name} ends with {channels[-1]}, which is not a multiple of the {latent} latent channels"


def _are_numbers(values: Any, least: int) -> bool:
    return all(isinstance(value, int) and value >= least for value in values)


DC = AutoencoderKind(
    class_name="AutoencoderDC",
    encode=_encode,
    downsample_factor=lambda settings: 2 ** (len(settings["encoder_block_out_channels"]) - 1),
    problems=_problems,
)
