"""Images of a source that cannot be decoded, and photos that are stored sideways: found before anything is computed."""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from edt_core.data.images import decode_rgb, is_turned
from edt_core.data.sources import Listing, RawImage

MOST_INSPECTED = 2000
SECONDS = 20.0
_FIRST = 64  # images that are read of any source, however long it takes
_HEADERS = 256  # images whose EXIF orientation `count_turned` reads
_EXAMPLES = 3


@dataclass(frozen=True)
class Inspection:
    """What decoding found. inspected, total: images that were decoded, and all of the source.

    unreadable: (name, reason) of each image that cannot be decoded. turned: number of images with an EXIF orientation
    that is not upright. sides: shorter sides in pixels.
    """

    inspected: int
    total: int
    unreadable: tuple[tuple[str, str], ...] = ()
    turned: int = 0
    sides: tuple[int, ...] = ()

    @property
    def extent(self) -> str:
        """`all 404 images`, or `2,000 of 1,281,167 images`."""
        whole = f"{self.total:,} images"
        return f"all {whole}" if self.inspected == self.total else f"{self.inspected:,} of {whole}"

    def unreadable_text(self) -> str:
        """The number of unreadable images, and the first of them with their reasons."""
        shown = "; ".join(f"{name}: {reason}" for name, reason in self.unreadable[:_EXAMPLES])
        more = len(self.unreadable) - _EXAMPLES
        rest = f"; {more} more" if more > 0 else ""
        return f"{len(self.unreadable)} of {self.inspected:,} images cannot be read ({shown}{rest})"


def inspect(listing: Listing, seconds: float = SECONDS, most: int = MOST_INSPECTED) -> Inspection:
    """Decode images at even distances: all of a small set, otherwise as many as the limits allow.

    Of a remote source, and of Parquet files, whose row groups are read as a whole, only the first 64 are decoded.
    Raises what `Listing.images` raises.
    """
    end = time.monotonic() + seconds
    unreadable: list[tuple[str, str]] = []
    turned, inspected = 0, 0
    sides: list[int] = []
    with closing(_decoded(listing)) as images:
        for image in images:
            inspected += 1
            turned += image.turned
            if image.side:
                sides.append(image.side)
            else:
                unreadable.append((image.name, image.reason))
            if inspected >= most or (inspected >= _FIRST and time.monotonic() > end):
                break
    return Inspection(inspected, len(listing), tuple(unreadable), turned, tuple(sides))


def count_turned(listing: Listing) -> tuple[int, int]:
    """(images with an EXIF orientation that is not upright, images that were read), of 256 at even distances."""
    places = _evenly(len(listing), _HEADERS)
    return sum(listing.take(places).convert(lambda image: is_turned(image.data or b""))), len(places)


@dataclass(frozen=True)
class _Decoded:
    """One image: its shorter side in pixels, 0 with a reason if it cannot be decoded."""

    name: str
    side: int = 0
    turned: bool = False
    reason: str = ""


def _decode(image: RawImage) -> _Decoded:
    decoded, reason = image.attempt(lambda data: (min(decode_rgb(data).size), is_turned(data)))
    side, turned = decoded or (0, False)
    return _Decoded(image.name, side, turned, reason)


def _decoded(listing: Listing) -> Generator[_Decoded, None, None]:
    """The images in passes over the whole source, so that any beginning of them is spread evenly."""
    total = len(listing)
    if listing.remote or listing.access == "parquet":
        yield from listing.take(_evenly(total, _FIRST)).convert(_decode)
        return
    passes = -(-total // _FIRST)
    for first in range(passes):
        yield from listing.take(np.arange(first, total, passes)).convert(_decode)


def _evenly(total: int, most: int) -> np.ndarray:
    """At most this many of the positions 0..total-1, int64, at even distances."""
    return np.unique(np.linspace(0, total - 1, min(most, total)).astype(np.int64))
