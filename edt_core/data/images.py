"""Decoding and encoding of images, and the ADM center crop."""

import importlib
import io
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's limit for a decompression bomb: 268 MB when decoded
MAX_IMAGE_BYTES = 4 * MAX_PIXELS  # of one encoded image: the largest in 8-bit RGBA without compression
# Pillow recognises these without decoding them; EPS is a program, which it passes to Ghostscript.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@cache
def image_formats() -> dict[str, tuple[str, ...]]:
    """Extensions, in lower case, of each format that the installed Pillow decodes, in the order in which it tries them.

    HEIC, JPEG XL and, with an older Pillow, AVIF need their plugins: pillow-heif, pillow-jxl-plugin,
    pillow-avif-plugin.
    """
    for plugin in ("pillow_heif", "pillow_jxl", "pillow_avif"):
        with suppress(ImportError):
            module = importlib.import_module(plugin)
            if plugin == "pillow_heif":  # the others register on import
                module.register_heif_opener()
    Image.preinit()  # the usual formats, which are tried first
    Image.init()
    by_format: dict[str, list[str]] = {name: [] for name in Image.ID if name not in _NOT_DECODED}
    for extension, name in Image.registered_extensions().items():
        if name in by_format:
            by_format[name].append(extension)
    return {name: tuple(sorted(extensions)) for name, extensions in by_format.items()}


@cache
def image_extensions() -> frozenset[str]:
    """Extensions, with their dot and in lower case, of the files that count as images."""
    return frozenset(extension for extensions in image_formats().values() for extension in extensions)


def decode_rgb(data: bytes, decoder: str = "pillow", rotate_by_exif: bool = False) -> Image.Image:
    """Decode to 8-bit RGB by content, not by file name; of an animation, the first frame.

    Alpha is dropped and CMYK converted by Pillow, as in the published preparation of ImageNet; 16-bit grey levels are
    scaled, which Pillow alone would clip to white. `decoder="simplejpeg"` decodes RGB or grey JPEG faster, with
    different pixels at the edges of colours (chroma upsampling). `rotate_by_exif` turns photos upright.

    Raises OSError, ValueError, SyntaxError or another Pillow error for data that is not an image, is truncated, or has
    more than MAX_PIXELS.
    """
    with _opened(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}: a decompression bomb")
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if rotate_by_exif else 1
        rgb = _simplejpeg(data) if decoder == "simplejpeg" and _is_plain_jpeg(image) else _to_rgb(image)
    turn = _TURNS.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def is_turned(data: bytes) -> bool:
    """Whether an encoded image has an EXIF orientation that is not upright; False for data that is not an image."""
    try:
        with _opened(data) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNS
    except Exception:  # Pillow's decoders raise errors of any class on malformed data
        return False


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=tuple(image_formats()))
    except UnidentifiedImageError:  # Pillow's message contains a memory address, which differs in every run
        raise UnidentifiedImageError(f"{len(data)} bytes that are not an image in a format Pillow decodes") from None


# EXIF 2.3, tag 274: the transposition that turns the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L")


def _simplejpeg(data: bytes) -> Image.Image:
    import simplejpeg

    return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels: their range is not stated")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.dtype != np.uint16:
            levels = levels.clip(0, 65535).astype(np.uint16)
        return Image.fromarray(_eight_bit()[levels]).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


@cache
def _eight_bit() -> NDArray[np.uint8]:
    """The 8-bit level of each 16-bit level, rounded: with a table no wide copy of a large image is needed."""
    return ((np.arange(65536) + 128) // 257).astype(np.uint8)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's center crop to size x size: halve by box filter while twice too large, bicubic to size, crop the middle.

    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233), the preparation of their ImageNet data. Raises ValueError for an
    image so narrow that an intermediate size would exceed MAX_PIXELS.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    largest = max(width * image.height, size * height)
    if largest > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels: the resize to {size} x {size} would need {largest:,} pixels, more "
            f"than {MAX_PIXELS:,}; the image is too narrow"
        )
    left, top = (width - size) // 2, (height - size) // 2
    # Pillow resamples columns, then rows, with 8-bit levels between. As two steps the result is the same, and rows are
    # computed only for the columns inside the crop.
    columns = image.resize((width, image.height), Image.Resampling.BICUBIC)
    middle = columns.crop((left, 0, left + size, image.height))
    return middle.resize((size, height), Image.Resampling.BICUBIC).crop((0, top, size, top + size))


# On 250 photos at 256 px: WebP 97 kB in 1.7 ms, PNG 119 kB in 3.6 ms; Pillow's default PNG is 117 kB in 12.4 ms.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "webp": {"lossless": True, "quality": 0, "method": 0},
    "png": {"compress_level": 1, "compress_type": zlib.Z_RLE},
    "jpeg": {"subsampling": 0},
}


def encode_image(image: Image.Image, image_format: str, jpeg_quality: int = 95) -> bytes:
    """Bytes of an RGB image: "webp" (lossless) and "png" keep every pixel, "jpeg" does not."""
    options = {**SAVE_OPTIONS[image_format], **({"quality": jpeg_quality} if image_format == "jpeg" else {})}
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """Lossless PNG bytes."""
    return encode_image(image, "png")


def to_model_range(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [N, S, S, 3] in 0..255 -> float32 [N, 3, S, S] in -1..1, the input of the autoencoders."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def write_image_folder(root: Path, images: Iterable[NDArray[np.uint8]], labels: Sequence[str]) -> None:
    """Write grey-scale images [S, S] as `root/<label>/<NNNNN>.png`, numbered in order."""
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:05d}.png").write_bytes(encode_png(Image.fromarray(pixels)))
