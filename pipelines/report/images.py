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

THUMBNAIL = 96  # px on the page, twice that in the file for screens with two pixels a px
_CLOSEST = 1  # per cent of real images whose distance to another real image is taken for suspiciously small

Array = NDArray[Any]


@dataclass(frozen=True)
class GalleryCell:
    """Images of one class from one origin, as data URIs, and the words for who cannot see them."""

    heading: str
    description: str
    images: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Origin:
    """Images [N, S, S, 3] with labels [N] of one origin, and how many of a class are shown: small ones, large ones."""

    heading: str
    what: str
    images: Array
    labels: Array
    limits: tuple[int, int]


def gallery(classes: Sequence[str], origins: Sequence[Origin]) -> list[tuple[str, list[GalleryCell]]]:
    """(class, cells) for the first classes, a cell an origin. Raises ValueError for images of the wrong shape."""
    for origin in origins:
        check_images(origin.images, origin.labels, origin.what)
    rows = []
    for label, name in enumerate(classes[:MAX_CLASSES]):
        cells = []
        for origin in origins:
            small, large = origin.limits
            limit = small if origin.images.shape[1] <= PIXELATED_UP_TO else large
            chosen = tuple(image_uri(image) for image in origin.images[origin.labels == label][:limit])
            cells.append(GalleryCell(origin.heading, f"{len(chosen)} {origin.what} of class {name}", chosen))
        rows.append((name, cells))
    return rows


def display_size(size: int) -> int:
    """Side in px at which an image of this size is shown: a whole multiple where it is small."""
    return size * max(1, PIXELATED_UP_TO // size) if size <= PIXELATED_UP_TO else THUMBNAIL


def image_uri(image: Array) -> str:
    """PNG of a small image as it is; JPEG thumbnail of a larger one."""
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
    """A generated image, and its nearest real ones as (data URI, distance, class name where it is another one)."""

    name: str
    image: str
    real: tuple[tuple[str, float, str | None], ...]


@dataclass(frozen=True)
class NeighbourView:
    """What is said and shown of neighbours.

    closest: the distance within which the closest _CLOSEST per cent of the real images lie to another; `within`: how
    many of `generated` images lie within that distance of a real one.
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


def neighbour_view(found: Neighbourhood, classes: Sequence[str]) -> NeighbourView:
    """The rows to show, and how near generated images are to real ones as against those to each other."""
    rows = []
    for place, label in enumerate(found.labels.tolist()):
        others = [classes[other] if other != label else None for other in found.real_labels[place].tolist()]
        pictures = [image_uri(image) for image in found.real[place]]
        real = tuple(zip(pictures, found.distances[place].tolist(), others, strict=True))
        rows.append(NeighbourRow(classes[label], image_uri(found.samples[place]), real))
    closest = float(np.percentile(found.real_nearest, _CLOSEST))
    return NeighbourView(
        rows=tuple(rows),
        histogram=distance_histogram(found.generated_nearest, found.real_nearest),
        generated=len(found.generated_nearest),
        real=len(found.real_nearest),
        generated_median=float(np.median(found.generated_nearest)),
        real_median=float(np.median(found.real_nearest)),
        closest_percent=_CLOSEST,
        closest=closest,
        within=int((found.generated_nearest <= closest).sum()),
    )
