"""Conversion between raw latents of an autoencoder and latents of the model, defined only here.

The settings are those of diffusers autoencoders, the equations those of its Flux and Stable Diffusion XL pipelines:

    scaling_factor alone:            latents = z * scaling_factor
    with shift_factor:               latents = (z - shift_factor) * scaling_factor
    with latents_mean, latents_std:  latents = (z - latents_mean) * scaling_factor / latents_std, by channel

They are settings of the autoencoder. A model that was trained on latents normalised by channel has `latents_mean` and
`latents_std` in its own configuration, with a scaling factor of 1, and these count instead.

Legend: N samples, C latent channels, h side of the latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.models import ModelConfig
from edt_core.store.digests import listing

SCALE_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class LatentScale:
    """How raw latents are centred and scaled: the four settings of diffusers.

    `latents_mean` and `latents_std` [C] are given both or not at all.
    """

    scaling_factor: float
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "LatentScale":
        """The scale in a diffusers configuration, or in a record that `record` wrote. Other keys are ignored.

        Settings that change nothing (no shift, mean 0 with standard deviation 1) are left out, so that equal scales
        compare equal and latents keep the bits that the factor alone gives them. Raises KeyError without a factor.
        """
        mean, std = values.get("latents_mean"), values.get("latents_std")
        if mean is None or std is None or (not any(mean) and all(value == 1 for value in std)):
            mean = std = None
        return cls(
            float(values["scaling_factor"]),
            float(values.get("shift_factor") or 0.0),
            None if mean is None else tuple(map(float, mean)),
            None if std is None else tuple(map(float, std)),
        )

    @property
    def is_plain(self) -> bool:
        """Whether the scale consists of a scaling factor only."""
        return self == LatentScale(self.scaling_factor)

    def record(self) -> dict[str, Any]:
        """The settings as JSON values, by their names in diffusers, without those that change nothing."""
        values = {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor or None,
            "latents_mean": None if self.latents_mean is None else list(self.latents_mean),
            "latents_std": None if self.latents_std is None else list(self.latents_std),
        }
        return {name: value for name, value in values.items() if value is not None}

    def beyond_factor(self) -> dict[str, Any]:
        """The record without its scaling_factor: empty for a plain scale."""
        return {name: value for name, value in self.record().items() if name != "scaling_factor"}

    def to_model(self, raw: Tensor) -> Tensor:
        """Convert raw latents [N, C, h, h] to latents of the model."""
        if self.latents_mean is not None and self.latents_std is not None:
            mean, std = _by_channel(self.latents_mean, raw), _by_channel(self.latents_std, raw)
            return (raw - mean) * self.scaling_factor / std
        # No subtraction of 0: scaled latents of a plain autoencoder keep their bits.
        return (raw - self.shift_factor if self.shift_factor else raw) * self.scaling_factor

    def to_raw(self, latents: Tensor) -> Tensor:
        """Convert latents [N, C, h, h] of the model to raw latents, for the decoder."""
        if self.latents_mean is not None and self.latents_std is not None:
            mean, std = _by_channel(self.latents_mean, latents), _by_channel(self.latents_std, latents)
            return latents * std / self.scaling_factor + mean
        raw = latents / self.scaling_factor
        return raw + self.shift_factor if self.shift_factor else raw


def normalised(config: ModelConfig, latents: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a model that is trained on normalised latents, from the counts of their artifact.

    Where the autoencoder's own configuration has statistics, they are part of its scale, and the model needs none. The
    artifact's are those of all its images and mirror images, with the variance of the posterior: of what a training
    draws. Raises UserError if the artifact has none, or a channel is constant.
    """
    if LatentScale.of(latents).latents_mean is not None:
        return config
    mean, std = latents.get("channel_mean"), latents.get("channel_std")
    if mean is None or std is None:
        raise UserError(
            "train.latent_norm is true, but the latents artifact has no statistics of its channels; encode the images "
            "again, or set train.latent_norm=false"
        )
    if constant := [str(channel) for channel, value in enumerate(std) if not value > 0]:
        raise UserError(
            f"train.latent_norm is true, but {len(constant)} of the {len(std)} channels of the latents are constant "
            f"({listing(constant, ', ')}), so they cannot have unit variance; use another autoencoder, or set "
            "train.latent_norm=false"
        )
    return replace(config, latents_mean=tuple(mean), latents_std=tuple(std))


def model_scale(config: ModelConfig, own: LatentScale) -> LatentScale:
    """The scale between raw latents and those of a model; `own` is that of its autoencoder's configuration."""
    if config.latents_mean is None:
        return own
    statistics = {"latents_mean": config.latents_mean, "latents_std": config.latents_std}
    return LatentScale.of({"scaling_factor": 1.0, **statistics})


def _by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """[C, 1, 1] on the device of a tensor [N, C, h, h]; the copy does not make the host wait for the device."""
    channels = torch.tensor(values, dtype=like.dtype).view(-1, 1, 1)
    return channels.to(like.device, non_blocking=True)
