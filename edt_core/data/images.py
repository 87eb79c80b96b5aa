"""Labelled images on disk, and the ADM center crop."""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edt_core.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageFolder:
    """A folder with one sub-folder a class. `entries` are (path relative to root, class index), sorted by path."""

    root: Path
    classes: tuple[str, ...]
    entries: tuple[tuple[str, int], ...]


def scan_image_folder(root: Path) -> ImageFolder:
    """List `root/<class>/**/<image>`; the class index is the place of the class name in sorted order.

    Raises UserError where there is no such folder, no image in it, or fewer than two classes.
    """
    if not root.is_dir():
        raise UserError(f"the image folder {root} does not exist; give the folder that holds one sub-folder a class")
    classes: list[str] = []
    entries: list[tuple[str, int]] = []
    others = 0
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = sorted(_files_below(folder))
        images = [path for path in files if path.suffix.lower() in EXTENSIONS]
        others += len(files) - len(images)
        if images:
            entries += [(path.relative_to(root).as_posix(), len(classes)) for path in images]
            classes.append(folder.name)
    if not entries:
        raise UserError(
            f"no images in {root}: {others} other files and {len(classes)} class folders found; expected "
            f"{root}/<class>/<image> with one of the extensions {', '.join(EXTENSIONS)}"
        )
    if len(classes) < 2:
        raise UserError(
            f"only one class ({classes[0]!r}, {len(entries)} images) in {root}: a class-conditional model needs at "
            "least 2; put the images of each class into a sub-folder of its own"
        )
    return ImageFolder(root, tuple(classes), tuple(sorted(entries)))


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file at any depth. Raises UserError for a folder that cannot be read: its class must not just vanish."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; mend its permissions") from error

    for root, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(root) / name for name in names)


def source_digest(source: ImageFolder, threads: int = 8) -> str:
    """sha256 over every image's path and bytes, in order: what the images are, whatever their dates say."""

    def file_digest(entry: tuple[str, int]) -> bytes:
        try:
            return hashlib.sha256((source.root / entry[0]).read_bytes()).digest()
        except PermissionError:  # preprocess lists it among the images that cannot be read
            return b"unreadable"

    total = hashlib.sha256()
    with ThreadPoolExecutor(threads) as pool:
        for (path, label), digest in zip(source.entries, pool.map(file_digest, source.entries), strict=True):
            total.update(f"{path}\0{label}\0".encode("utf-8", "surrogateescape") + digest)
    return total.hexdigest()


def decode_rgb(data: bytes) -> Image.Image:
    """Decode with Pillow to 8-bit RGB; 16-bit grey levels are scaled, where Pillow alone would clip them to white.

    Raises OSError, ValueError or a Pillow error for what is no image.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            levels = np.asarray(image).astype(np.float64) / 257
            return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's center crop to size x size: halve by box filter while twice too large, bicubic to size, crop the middle.

    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233), the preparation of their ImageNet data.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def encode_png(image: Image.Image) -> bytes:
    """Lossless PNG bytes: FID references must not pass through JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def to_model_range(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [N, S, S, 3] in 0..255 -> float32 [N, 3, S, S] in -1..1, as the autoencoders take it."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def write_image_folder(root: Path, images: Iterable[NDArray[np.uint8]], labels: Sequence[str]) -> None:
    """Write grey-scale images [S, S] as `root/<label>/<NNNNN>.png`, numbered in order."""
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:05d}.png").write_bytes(encode_png(Image.fromarray(pixels)))
