"""What differs between the classes of autoencoders of diffusers, and the checks that several of them share.

Legend: N images, S image side in pixels, C latent channels, h latent side (S / downsample factor). Settings are those
of a config.json by their names in diffusers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from edt_core.data.scale import LatentScale

Settings: TypeAlias = Mapping[str, Any]


def decoded_sample(model: Any, raw: Tensor) -> Tensor:
    """Images [N, 3, S, S] in about -1..1 of raw latents [N, C, h, h], as most classes of diffusers decode."""
    images: Tensor = model.decode(raw).sample
    return images


@dataclass(frozen=True)
class AutoencoderKind:
    """A class of autoencoders of diffusers: how it is called, and how its configuration is read.

    encode: mean and standard deviation of the raw latents, [N, C, h, h] each, of images [N, 3, S, S] in -1..1. A
        deterministic encoder gives its latents and zeros.
    downsample_factor: image side / latent side, of the settings.
    problems: what is not supported in a configuration, of all settings (the class's defaults included) and of those
        that the file itself has. Checks that hold for every kind are in `edt_core.autoencoders.check`.
    decode: images in about -1..1 of raw latents.
    scale: how raw latents become those of the model, of the settings. Raises KeyError without a scaling factor.
    channels_setting: the setting that holds C.
    also_saved: what `save_pretrained` writes beside the arguments of the constructor.
    """

    class_name: str
    encode: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    downsample_factor: Callable[[Settings], int]
    problems: Callable[[Settings, Settings], Iterator[str]]
    decode: Callable[[Any, Tensor], Tensor] = decoded_sample
    scale: Callable[[Settings], LatentScale] = LatentScale.of
    channels_setting: str = "latent_channels"
    also_saved: frozenset[str] = frozenset()

    def facts(self, settings: Settings) -> dict[str, Any]:
        """Downsample factor, latent channels and scale, as they are recorded of an autoencoder."""
        return {
            "downsample_factor": self.downsample_factor(settings),
            "latent_channels": int(settings[self.channels_setting]),
            **self.scale(settings).record(),
        }


def differing_levels(lists: Settings) -> Iterator[str]:
    """Problems of lists that must have an entry for each level: the downsample factor is counted from one of them."""
    if bad := [key for key, value in lists.items() if not isinstance(value, list | tuple) or not value]:
        yield from (f"{key} is {lists[key]!r}, not a list of levels" for key in bad)
        return
    if len({len(value) for value in lists.values()}) > 1:
        yield f"levels differ: {', '.join(f'{key} has {len(value)}' for key, value in lists.items())}"
