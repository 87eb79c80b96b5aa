"""The differences between diffusers' autoencoder classes, and the checks that several of them share.

Legend: N images, S image side in pixels, C latent channels, h latent side (S / downsample factor). Settings are the
entries of a config.json, with their names in diffusers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from edt_core.data.scale import LatentScale

Settings: TypeAlias = Mapping[str, Any]


def decoded_sample(model: Any, raw: Tensor) -> Tensor:
    """Images [N, 3, S, S] in about -1..1 of raw latents [N, C, h, h], by the interface of most diffusers classes."""
    images: Tensor = model.decode(raw).sample
    return images


@dataclass(frozen=True)
class AutoencoderKind:
    """A diffusers class of autoencoders: how to call it, and how to read its configuration.

    encode: (model, images [N, 3, S, S] in -1..1) -> mean and standard deviation of the raw latents, [N, C, h, h] each.
        A deterministic encoder returns its latents and zeros.
    downsample_factor: settings -> image side / latent side.
    problems: (settings with the class's defaults, settings in the file) -> messages about unsupported settings. Checks
        for all kinds are in `edt_core.autoencoders.check`.
    decode: (model, raw latents) -> images in about -1..1.
    scale: settings -> the scale between raw latents and those of the model. Raises KeyError without a scaling factor.
    channels_setting: name of the setting with C.
    also_saved: settings that `save_pretrained` writes beside the arguments of the constructor.
    own_class: gives the class, if it is one of this package and not of diffusers.
    levels: of codes, if the latents are their values; None for numbers.
    """

    class_name: str
    encode: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    downsample_factor: Callable[[Settings], int]
    problems: Callable[[Settings, Settings], Iterator[str]]
    decode: Callable[[Any, Tensor], Tensor] = decoded_sample
    scale: Callable[[Settings], LatentScale] = LatentScale.of
    channels_setting: str = "latent_channels"
    also_saved: frozenset[str] = frozenset()
    own_class: Callable[[], type[Any]] | None = None
    levels: tuple[int, ...] | None = None

    @property
    def model_class(self) -> Any:
        """The class by which models are loaded."""
        import diffusers

        return getattr(diffusers, self.class_name) if self.own_class is None else self.own_class()

    def facts(self, settings: Settings) -> dict[str, Any]:
        """Downsample factor, latent channels, scale, and levels of codes, in the form of an autoencoder's record."""
        return {
            "downsample_factor": self.downsample_factor(settings),
            "latent_channels": int(settings[self.channels_setting]),
            **self.scale(settings).record(),
            **({} if self.levels is None else {"levels": list(self.levels)}),
        }


def differing_levels(lists: Settings) -> Iterator[str]:
    """Problems of lists that need one entry per level, since the downsample factor is computed from one of them."""
    if bad := [key for key, value in lists.items() if not isinstance(value, list | tuple) or not value]:
        yield from (f"{key} is {lists[key]!r}, not a list of levels" for key in bad)
        return
    if len({len(value) for value in lists.values()}) > 1:
        yield f"levels differ: {', '.join(f'{key} has {len(value)}' for key, value in lists.items())}"
