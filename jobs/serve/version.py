"""A version of a model in memory: its images for (label, seed, index), in batches of one size.

Shapes: N images, S image size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.config import ChainConfig
from edt_core.errors import UserError
from jobs.models.names import registered_version
from jobs.models.open import Loaded, load_model
from jobs.models.registry_files import DIGEST_TAG
from jobs.runtime.tracking import mlflow_client
from jobs.stages.autoencoder import check_decoder

if TYPE_CHECKING:
    from edt_core.sampling.class_names import Names


class ImageSpec(NamedTuple):
    """One image: its label, and what its noise is a function of."""

    label: int
    seed: int
    number: int


@dataclass(frozen=True)
class VersionName:
    """A registered version, and the sha256 of the list of its files' digests ("" if it was registered without)."""

    name: str
    number: str
    digest: str

    @property
    def label(self) -> str:
        return f"{self.name}/{self.number}"


def find_version(location: str) -> VersionName:
    """The version at NAME@ALIAS, NAME/NUMBER or NAME in the MLflow of this process. Raises UserError."""
    version = registered_version(mlflow_client(), location)
    return VersionName(version.name, str(version.version), version.tags.get(DIGEST_TAG, ""))


def load_version(version: VersionName, device: str) -> "ServedVersion":
    """Download a version, compare its files with their digests, and put it on a device. Raises UserError."""
    return ServedVersion(version, load_model(version.label), device)


class ServedVersion:
    """A version that images are drawn from, by one thread at a time."""

    def __init__(self, name: VersionName, loaded: Loaded, device: str) -> None:
        from edt_core.sampling.class_names import class_names

        if loaded.autoencoder is None:
            raise UserError(f"{name.label} has no autoencoder, so it makes no images; register it with one")
        check_decoder(loaded.model.config, loaded.autoencoder)
        self.name, self._loaded = name, loaded
        self._model, self._decoder = loaded.model.to(device), loaded.autoencoder.to(device)
        if loaded.guide is not None:
            loaded.guide.to(device)
        self._classify = loaded.classify_by(self._decoder)
        self.classes: tuple[Names, ...] = class_names(loaded.classes, self.num_classes)

    @property
    def num_classes(self) -> int:
        """The number of its classes."""
        return self._loaded.model.config.num_classes

    def labels(self, classes: Sequence[int | str]) -> list[int]:
        """Labels of classes: an integer is an index, a text a name. Raises UserError for those that do not exist."""
        from edt_core.sampling.class_names import class_labels
        from edt_core.sampling.sampler import checked_labels

        labels = [one if isinstance(one, int) else class_labels([one], self.classes)[0] for one in classes]
        return [int(label) for label in checked_labels(labels, len(labels), self.num_classes)]

    def chain(self, settings: Mapping[str, Any]) -> ChainConfig:
        """The configuration of the model's evaluation with the settings of a request. Raises UserError."""
        from edt_core.sampling.pipeline_options import call_chain

        options = dict(settings)
        return call_chain(self._loaded.sampling, None, options.pop("num_inference_steps", None), options)

    def draw(self, chain: ChainConfig, images: Sequence[ImageSpec], size: int) -> list[NDArray[np.uint8]]:
        """Pixels, uint8 [S, S, 3] each, of at most `size` images. The batch is filled up to `size` with copies.

        So every batch has the same shape and is computed by the same kernels. Raises UserError for a chain that the
        model does not have, and for images that are not finite.
        """
        from edt_core.autoencoders.autoencoder import decode_to_pixels
        from edt_core.diffusion import SampleNoise
        from edt_core.sampling.sampler import LatentSampler

        timesteps, guide = self._loaded.num_timesteps, self._loaded.guide_of(chain)
        sampler = LatentSampler(self._model, chain, timesteps, guide, classify=self._classify)
        labels, seeds, indices = zip(*images, *[images[-1]] * (size - len(images)), strict=True)
        noise = SampleNoise(seeds, indices, sampler.latent_shape, sampler.device)
        latents = sampler.from_noise(labels, noise, indices)
        return list(decode_to_pixels(self._decoder, latents, self._model.config)[: len(images)])
