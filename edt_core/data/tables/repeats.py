"""Images that are identical byte for byte, found by their digests."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.data.tables.arrow_file import ROWS
from edt_core.data.tables.digest_rows import DigestRows

_EXAMPLES = 10


class Repeats(NamedTuple):
    """Images that are identical byte for byte.

    duplicates: all except one of each image. under_several_classes: distinct images that are in two classes or more.
    examples: two positions [n, 2], among the written images, of each of the first ten of those.
    """

    duplicates: int
    under_several_classes: int
    examples: NDArray[np.int64]


def repeats_among(digests: DigestRows, written: NDArray[np.int64], labels: NDArray[np.int32]) -> Repeats:
    """Repeats among the written images [n]: their positions among all, and their labels. Takes 17 bytes an image.

    Only images whose last 8 bytes of the digest occur again are compared whole.
    """
    ends = np.empty(len(digests), np.uint64)
    for first, block in digests.blocks():
        ends[first : first + len(block)] = block.view(np.uint64)[:, -1]
    in_order = np.sort(ends[written])
    again = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    is_candidate = np.zeros(len(written), np.bool_)
    for first in range(0, len(written) if len(again) else 0, ROWS):
        part = ends[written[first : first + ROWS]]
        place = np.minimum(np.searchsorted(again, part), len(again) - 1)
        is_candidate[first : first + ROWS] = again[place] == part
    candidates = np.flatnonzero(is_candidate)
    found = _repeats_of(digests.take(written[candidates]), labels[candidates])
    return found._replace(examples=candidates[found.examples])


def _repeats_of(digests: NDArray[np.uint8], labels: NDArray[np.int32]) -> Repeats:
    """Repeats among all of these images."""
    words = digests.view(np.uint64)  # [n, 4]
    order = np.lexsort((labels, *words.T))
    same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    mixed = np.flatnonzero(same & (labels[order[1:]] != labels[order[:-1]]))
    image = np.cumsum(~same)[mixed]  # which distinct image each pair shows
    _, first = np.unique(image, return_index=True)
    starts = mixed[first[:_EXAMPLES]]
    return Repeats(int(same.sum()), len(first), np.stack([order[starts], order[starts + 1]], axis=1))
