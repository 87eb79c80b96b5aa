"""A grid of images as one picture, with one named row per class.

Shapes: N images, S image size; images are uint8 RGB [N, S, S, 3] with labels int [N], indices into `classes`.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_CLASSES = 20  # rows of a grid
PIXELATED_UP_TO = 64  # px; a larger image is shown as a thumbnail, a smaller one enlarged by an integer factor

Array = NDArray[Any]


def sample_grid(
    images: Array, labels: Array, classes: Sequence[str], per_class: int = 8, scale: int | None = None
) -> bytes:
    """A PNG with one row per class: its name, then up to `per_class` of its images, in order.

    images: uint8 [N, S, S, 3]; labels: int [N]. scale: integer factor of nearest-neighbour enlargement, None
    for about 64 pixels per image. With more than 20 classes the first 20 are shown, with a note in the last line.
    Raises ValueError for images or labels of the wrong shape.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    check_images(images, labels, "images")
    size = images.shape[1]
    side = size * (scale or max(1, PIXELATED_UP_TO // size))
    gap, font_size, names = 4, 13, classes[:MAX_CLASSES]
    font = ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), font_size)
    texts = [shortened(" ".join(encodable(name).split()), 24) for name in names]
    margin = 4 * gap + math.ceil(max((font.getlength(text) for text in texts), default=0))
    footer = f"first {len(names)} of {len(classes):,} classes" if len(names) < len(classes) else ""
    row_height = max(side, font_size) + gap
    width = margin + max(per_class * (side + gap), math.ceil(font.getlength(footer)))
    height = gap + row_height * len(names) + (2 * font_size if footer else 0)

    sheet = Image.new("RGB", (width, height), "#ffffff")
    draw = ImageDraw.Draw(sheet)
    for label, text in enumerate(texts):
        top = gap + label * row_height
        draw.text((2 * gap, top + side / 2), text, fill="#1b1f24", font=font, anchor="lm")
        for column, image in enumerate(images[labels == label][:per_class]):
            enlarged = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin + column * (side + gap), top))
    if footer:
        draw.text((margin, height - 1.2 * font_size), footer, fill="#57606a", font=font, anchor="lm")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def check_images(images: Array, labels: Array, what: str) -> None:
    """Raise ValueError, which begins with `what`, for images or labels of the wrong shape."""
    square = images.ndim == 4 and images.shape[1] == images.shape[2] > 0 and images.shape[3] == 3
    if images.dtype != np.uint8 or not square or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{what}: uint8 [N, S, S, 3] with labels [N] expected, "
            f"got {images.dtype} {list(images.shape)} with labels {list(labels.shape)}"
        )


def encodable(text: str) -> str:
    """Text that can be encoded as UTF-8: a folder name that is not UTF-8 contains lone surrogates."""
    return text.encode(errors="replace").decode()


def shortened(text: str, length: int) -> str:
    """The text, cut with an ellipsis if it is longer than `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"
