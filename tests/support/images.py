"""The ADM crop, spelled out, to compare with."""

import numpy as np
from PIL import Image


def reference_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop, spelled out as its paper's code does the steps, on whole arrays."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
