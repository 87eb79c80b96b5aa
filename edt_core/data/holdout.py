"""The images that a training holds out, chosen by the sha256 of their originals.

An image is held out if its sha256, read as a fraction of the largest, is below the share. That depends on the image
alone: images that come or go move no other one, and copies of a file are all on one side, as is an image with its
mirror image, which share a row. If fewer than 64 images of a data set were held out so, the 64 of lowest sha256 are.
Images that are added then can only move an image from the held-out part to the training part.

Legend: N images of a data set, H of them held out, M of those measured.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edt_core.errors import UserError

LEAST_HELD_OUT = 64  # images, for any share
MOST_MEASURED = 1024  # images that the loss is measured on


@dataclass(frozen=True, eq=False)
class Holdout:
    """Held-out rows of a data set, int64 [H] in order, and those that are measured, int64 [M], in order of sha256.

    digests: sha256 of the originals of the measured rows, uint8 [M, 32].
    """

    rows: NDArray[np.int64]
    measured: NDArray[np.int64]
    digests: NDArray[np.uint8]

    def training_rows(self, total: int) -> NDArray[np.int64]:
        """The rows of 0..total-1 that are not held out, int64 [total - H], in order."""
        kept = np.ones(total, np.bool_)
        kept[self.rows] = False
        return np.flatnonzero(kept)


def choose_held_out(digests: NDArray[np.uint8], share: float) -> Holdout:
    """The rows to hold out of images with these sha256, uint8 [N, 32]; `share` is above 0 and at most 0.5.

    Measured are the held-out rows of lowest sha256.
    """
    words = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)  # [N, 4]
    order = np.lexsort(words.T[::-1])
    first = words[:, 0]
    held = first < np.uint64(int(share * 2.0**64))
    if held.sum() < LEAST_HELD_OUT <= len(words):
        held = first <= first[order[LEAST_HELD_OUT - 1]]
    measured = order[held[order]][:MOST_MEASURED]
    return Holdout(np.flatnonzero(held), measured, digests[measured])


def expected_held_out(share: float, images: int) -> int:
    """About how many of `images` a share holds out; their digests decide on the exact number."""
    return max(LEAST_HELD_OUT, round(share * images)) if share else 0


def check_holdout(share: float, held_out: int, images: int, batch: int) -> None:
    """Raise UserError if `held_out` of `images` leave too few for a training with global batches of `batch`."""
    problem = holdout_problem(share, held_out, images, batch)
    if problem:
        raise UserError(problem)


def holdout_problem(share: float, held_out: int, images: int, batch: int) -> str:
    """Why so many images cannot be held out, with the remedy; "" if they can."""
    if not share:
        return ""
    if images < LEAST_HELD_OUT * 2:
        return (
            f"train.holdout is {share:g}, and at least {LEAST_HELD_OUT} images are held out, which is more than half "
            f"of the {images}; set train.holdout=0, or use at least {LEAST_HELD_OUT * 2} images"
        )
    if images - held_out < batch:
        return (
            f"train.holdout is {share:g}: of {images} images it leaves {images - held_out} for the training, fewer "
            f"than a batch of {batch} (train.global_batch_size); hold out fewer, use a smaller batch, or set "
            "train.holdout=0"
        )
    return ""
