"""ADM's reference batches: statistics of Inception's features of real images, and some of the images, in one npz.

The format of openai/guided-diffusion `evaluations` (VIRTUAL_imagenet256_labeled.npz): mu [2048], sigma [2048, 2048] of
the pooled features, mu_s [2023], sigma_s [2023, 2023] of the spatial ones, arr_0 uint8 [N, S, S, 3] of images. Such
files come from elsewhere: arrays of Python objects, which are pickles, are refused, and no array is read whose header
does not say what is expected.
"""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from edt_core.errors import UserError
from edt_core.evaluation.metrics.statistics import FloatArray, Gaussian

POOL_DIMENSIONS = 2048
SPATIAL_DIMENSIONS = 2023  # 7 channels of 17 x 17
_IMAGES = "arr_0"
_READ_AT_ONCE = 1 << 24
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, eq=False)
class AdmReference:
    """What a reference batch states.

    statistics, spatial_statistics: of the pooled and the spatial features; their number of images is not in the file.
    image_shape: (N, S, S, 3) of the images in it, which `read_images` yields; None where it has none.
    """

    statistics: Gaussian
    spatial_statistics: Gaussian | None
    image_shape: tuple[int, int, int, int] | None


def read_adm(path: Path | str) -> AdmReference:
    """The statistics of a reference batch; of its images the header alone.

    Raises UserError for a file that is no such npz or is damaged, for pickled members, and for statistics of another
    size than Inception's, not finite or not symmetric.
    """
    with _opened(path) as archive:
        names = _members(archive)
        missing = [name for name in ("mu", "sigma") if name not in names]
        if missing:
            raise UserError(f"{path} lacks {missing}, it holds {sorted(names)}. Take a reference batch of ADM.")
        spatial = {"mu_s", "sigma_s"} & names
        if len(spatial) == 1:
            raise UserError(f"{path} has {spatial.pop()} alone; mu_s and sigma_s go together. Take the original file.")
        return AdmReference(
            _read_gaussian(archive, path, "mu", "sigma", POOL_DIMENSIONS),
            _read_gaussian(archive, path, "mu_s", "sigma_s", SPATIAL_DIMENSIONS) if spatial else None,
            _image_shape(archive, path) if _IMAGES in names else None,
        )


def count_images(path: Path | str) -> int:
    """How many images `read_images` will yield, by the header; 0 where the file holds statistics alone.

    Raises UserError as `read_images` does.
    """
    with _opened(path) as archive:
        return _image_shape(archive, path)[0] if _IMAGES in _members(archive) else 0


def read_images(path: Path | str, chunk_size: int = 256) -> Iterator[NDArray[np.uint8]]:
    """The images of a reference or sample batch in order, uint8 [n <= chunk_size, S, S, 3], one chunk in memory.

    Yields nothing where the file holds statistics alone. Raises UserError for a file that is no npz or is damaged, and
    for an arr_0 that holds no images.
    """
    with _opened(path) as archive:
        if _IMAGES not in _members(archive):
            return
        number, *image_shape = _image_shape(archive, path)
        with archive.open(f"{_IMAGES}.npy") as member:
            _read_header(member, path, _IMAGES)
            for start in range(0, number, chunk_size):
                count = min(chunk_size, number - start)
                pixels = _read_exactly(member, count * math.prod(image_shape), path, _IMAGES)
                yield np.frombuffer(pixels, np.uint8).reshape(count, *image_shape)
            _check_end(member, path, _IMAGES)


@contextmanager
def _opened(path: Path | str) -> Iterator[zipfile.ZipFile]:
    """The npz as an archive; what a damaged one raises becomes a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}. Download the reference batch first.") from error
    except _DAMAGE as error:
        raise UserError(f"{path} is not an npz, or a damaged one ({error}). Download it again.") from error


def _members(archive: zipfile.ZipFile) -> set[str]:
    """Names of the arrays."""
    return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


def _read_gaussian(archive: zipfile.ZipFile, path: Path | str, mean: str, covariance: str, size: int) -> Gaussian:
    """The two members as a Gaussian of `size` dimensions."""
    m, c = _read_floats(archive, path, mean, (size,)), _read_floats(archive, path, covariance, (size, size))
    try:
        return Gaussian(m, c)
    except UserError as error:
        raise UserError(f"{path}, {mean} and {covariance}: {error}") from error


def _read_floats(archive: zipfile.ZipFile, path: Path | str, name: str, expected: tuple[int, ...]) -> FloatArray:
    """A member of floats of the shape expected, as float64."""
    with archive.open(f"{name}.npy") as member:
        shape, is_fortran, dtype = _read_header(member, path, name)
        if len(shape) == len(expected) and shape != expected and len(set(shape)) == 1:
            raise UserError(
                f"{path} holds reference statistics of another extractor: {name} has {shape[0]} dimensions, that of "
                f"Inception {expected[0]}. Take statistics of the Inception network of FID."
            )
        if shape != expected or not np.issubdtype(dtype, np.floating):
            raise UserError(f"{path}: {name} is {dtype} of shape {shape}; floats of shape {expected} are expected.")
        values = np.frombuffer(_read_exactly(member, math.prod(shape) * dtype.itemsize, path, name), dtype)
        _check_end(member, path, name)
        return values.reshape(shape, order="F" if is_fortran else "C").astype(np.float64)


def _image_shape(archive: zipfile.ZipFile, path: Path | str) -> tuple[int, int, int, int]:
    with archive.open(f"{_IMAGES}.npy") as member:
        shape, is_fortran, dtype = _read_header(member, path, _IMAGES)
    if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or 0 in shape or is_fortran:
        raise UserError(f"{path}: {_IMAGES} is {dtype} of shape {shape}; images are uint8 [N, S, S, 3] in C order.")
    return shape[0], shape[1], shape[2], shape[3]


def _read_header(member: IO[bytes], path: Path | str, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an npy member, read up to where its values begin."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(member)
    if version not in readers:
        raise UserError(f"{path}: {name} is in version {version} of the npy format; save it in (1, 0).")
    shape, is_fortran, dtype = readers[version](member)
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds pickled Python objects, which are not read. Save it as a plain array.")
    return shape, is_fortran, dtype


def _read_exactly(member: IO[bytes], size: int, path: Path | str, name: str) -> bytearray:
    """`size` bytes, in portions, so that a header that promises too much costs no memory."""
    data = bytearray()
    while len(data) < size:
        portion = member.read(min(_READ_AT_ONCE, size - len(data)))
        if not portion:
            raise UserError(f"{path}: {name} ends after {len(data):,} of {size:,} bytes. Download it again.")
        data += portion
    return data


def _check_end(member: IO[bytes], path: Path | str, name: str) -> None:
    """Raises UserError where the member goes on; where its bytes are not those of its checksum, zipfile does."""
    if member.read(1):
        raise UserError(f"{path}: {name} holds more bytes than its header states. Download it again.")
