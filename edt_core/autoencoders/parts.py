"""How many images an autoencoder computes at once: one of its tensors then stays below a bound, whatever the batch.

The last bits of an image's result depend on how many images are computed at once, so the number is a function of the
image size alone. Legend: S image side in pixels.
"""

from collections.abc import Iterator

# SD-VAE's largest tensor has 256 channels of S x S. At 256 px, 64 images make 2^30 numbers, 4.3 GB in float32, of which
# several live at once. Larger images get half of that, which fits a GPU of 24 GB: 8 images at 512 px, 2 at 1,024 px.
_SMALL_SIDE = 256
_PIXELS, _PIXELS_LARGE = 64 * 256**2, 8 * 512**2


def images_per_call(side: int) -> int:
    """The most images of side S that an autoencoder encodes or decodes at once: 64 at 256 px, 8 at 512 px."""
    pixels = _PIXELS if side <= _SMALL_SIDE else _PIXELS_LARGE
    return max(1, pixels // side**2)


def in_parts(count: int, side: int) -> Iterator[slice]:
    """Slices of `count` images of side S, each as long as `images_per_call` except the last."""
    most = images_per_call(side)
    return (slice(start, min(start + most, count)) for start in range(0, count, most))
