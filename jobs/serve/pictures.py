"""The images of an answer as bytes: a PNG with all of them, or the arrays as npz.

Shapes: N images, S image size; images are uint8 RGB [N, S, S, 3].
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MEDIA_TYPES = {"png": "image/png", "npz": "application/octet-stream"}


def png(images: NDArray[np.uint8]) -> bytes:
    """One PNG: images in rows of ceil(sqrt(N)), in order, without gaps or scaling; places left over are black."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sheet(images)).save(buffer, "PNG")
    return buffer.getvalue()


def sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The images side by side, uint8 [rows * S, columns * S, 3] with columns = ceil(sqrt(N))."""
    count, side = images.shape[:2]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, side, side, 3), np.uint8)
    cells[:count] = images
    return cells.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def npz(images: NDArray[np.uint8], labels: Sequence[int]) -> bytes:
    """The arrays `images` uint8 [N, S, S, 3] and `labels` int64 [N]; numpy.load reads them."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images, labels=np.asarray(labels, np.int64))
    return buffer.getvalue()
