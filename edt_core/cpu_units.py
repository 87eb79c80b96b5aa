"""Images in units of a fixed number for networks on a CPU, so that what a network gives for an image is its own.

In the libraries that PyTorch calls on a CPU (oneDNN, MKL), the last bits of an image's result depend on how many images
are computed at once, and not on the image's place among them nor on the others. In units of exactly UNIT images the
result is thus a function of the image alone, whatever the batch size and whichever images are new.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNIT = 16  # images; with 8 and with 16 the results were measured to be independent of place and company

Extract = Callable[[NDArray[np.uint8]], dict[str, NDArray[np.float32]]]


def whole_units(batch_size: int) -> int:
    """The smallest multiple of UNIT from `batch_size` on: a batch of so many needs no padding."""
    return -(-batch_size // UNIT) * UNIT


def units(images: Any) -> Iterator[tuple[Any, int]]:
    """Yield units of UNIT images [UNIT, ...] and how many of each are wanted.

    `images`: an array or a tensor [N, ...]. The last unit is filled up with copies of its first image.
    """
    for start in range(0, len(images), UNIT):
        count = min(UNIT, len(images) - start)
        unit = images[start : start + count]
        if count < UNIT:
            unit = unit[[*range(count), *([0] * (UNIT - count))]]
        yield unit, count


class UnitExtractor:
    """A network of features on a CPU that always takes UNIT images at once."""

    def __init__(self, extract: Extract) -> None:
        self.extract = extract

    def __call__(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """What the network gives for uint8 [N, S, S, 3], each row a function of its image alone."""
        if not len(pixels):
            return self.extract(pixels)  # its own refusal
        parts: list[Mapping[str, NDArray[np.float32]]] = []
        for unit, count in units(pixels):
            parts.append({name: values[:count] for name, values in self.extract(unit).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
