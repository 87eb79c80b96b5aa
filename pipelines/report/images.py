"""The pictures of a report: samples by class, and generated images with their nearest real ones.

Shapes: N images, S image size; images are uint8 RGB [N, S, S, 3] with labels int [N], indices into `classes`.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.sampling.grid import MAX_CLASSES, PIXELATED_UP_TO, check_images
from pipelines.report.figures import Picture, data_uri, distance_histogram
from pipelines.report.inputs import Neighbourhood

THUMBNAIL = 96  # CSS px on the page; the file has twice as many pixels, for high-resolution screens
_CLOSEST = 1  # per cent of real images: the largest of their distances to another real image counts as suspicious

Array = NDArray[Any]


@dataclass(frozen=True)
class GalleryCell:
    """Images of one class from one origin, as data URIs, with a description for screen readers."""

    heading: str
    description: str
    images: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Origin:
    """Images [N, S, S, 3] with labels [N] of one origin. `limits`: images shown per class, if small and if large."""

    heading: str
    what: str
    images: Array
    labels: Array
    limits: tuple[int, int]


def gallery(classes: Sequence[str], origins: Sequence[Origin]) -> list[tuple[str, list[GalleryCell]]]:
    """(class, cells) for the first classes, one cell per origin. Raises ValueError for images of the wrong shape."""
    for origin in origins:
        check_images(origin.images, origin.labels, origin.what)
    rows = []
    for label, name in enumerate(classes[:MAX_CLASSES]):
        cells = []
        for origin in origins:
            small, large = origin.limits
            limit = small if origin.images.shape[1] <= PIXELATED_UP_TO else large
            uris = tuple(image_uri(image) for image in origin.images[origin.labels == label][:limit])
            cells.append(GalleryCell(origin.heading, f"{len(uris)} {origin.what} of class {name}", uris))
        rows.append((name, cells))
    return rows


def display_size(size: int) -> int:
    """Side in px at which an image of this size is shown: an integer multiple if it is small."""
    return size * max(1, PIXELATED_UP_TO // size) if size <= PIXELATED_UP_TO else THUMBNAIL


def image_uri(image: Array) -> str:
    """A data URI: PNG of a small image, JPEG thumbnail of a larger one."""
    from PIL import Image

    picture, buffer = Image.fromarray(image), io.BytesIO()
    if len(image) <= PIXELATED_UP_TO:
        picture.save(buffer, "PNG")
        return data_uri("image/png", buffer.getvalue())
    picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL), Image.Resampling.LANCZOS)
    picture.save(buffer, "JPEG", quality=88)
    return data_uri("image/jpeg", buffer.getvalue())


# Nearest neighbours


@dataclass(frozen=True)
class NeighbourRow:
    """A generated image, and its nearest real images as (data URI, distance, class name if it differs)."""

    name: str
    image: str
    real: tuple[tuple[str, float, str | None], ...]


@dataclass(frozen=True)
class NeighbourView:
    """The neighbours as the page shows them.

    `closest`: _CLOSEST per cent of the real images have another real image within this distance. `within`: how many of
    the `generated` images have a real image within this distance.
    """

    rows: tuple[NeighbourRow, ...]
    histogram: Picture
    generated: int
    real: int
    generated_median: float
    real_median: float
    closest_percent: int
    closest: float
    within: int


def neighbour_view(neighbours: Neighbourhood, classes: Sequence[str]) -> NeighbourView:
    """The rows to show, and distances of generated images to real ones compared with those between real ones."""
    rows = []
    for place, label in enumerate(neighbours.labels.tolist()):
        others = [classes[other] if other != label else None for other in neighbours.real_labels[place].tolist()]
        pictures = [image_uri(image) for image in neighbours.real[place]]
        real = tuple(zip(pictures, neighbours.distances[place].tolist(), others, strict=True))
        rows.append(NeighbourRow(classes[label], image_uri(neighbours.samples[place]), real))
    closest = float(np.percentile(neighbours.real_nearest, _CLOSEST))
    return NeighbourView(
        rows=tuple(rows),
        histogram=distance_histogram(neighbours.generated_nearest, neighbours.real_nearest),
        generated=len(neighbours.generated_nearest),
        real=len(neighbours.real_nearest),
        generated_median=float(np.median(neighbours.generated_nearest)),
        real_median=float(np.median(neighbours.real_nearest)),
        closest_percent=_CLOSEST,
        closest=closest,
        within=int((neighbours.generated_nearest <= closest).sum()),
    )
