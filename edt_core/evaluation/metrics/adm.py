"""ADM's reference batches: statistics of Inception's features of real images, and some of the images, in one npz.

The format of openai/guided-diffusion `evaluations` (VIRTUAL_imagenet256_labeled.npz): mu [2048], sigma [2048, 2048] of
the pooled features, mu_s [2023], sigma_s [2023, 2023] of the spatial ones, arr_0 uint8 [N, S, S, 3] of images. Such
files are untrusted: arrays of Python objects, which are pickles, are rejected, and an array is read only after its
header is checked.
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
    """The content of a reference batch.

    statistics, spatial_statistics: of the pooled and the spatial features; the file does not contain their number of
    images. image_shape: (N, S, S, 3) of the images that `read_images` yields; None if there are none.
    """

    statistics: Gaussian
    spatial_statistics: Gaussian | None
    image_shape: tuple[int, int, int, int] | None


def read_adm(path: Path | str) -> AdmReference:
    """Read the statistics of a reference batch, and only the header of its images.

    Raises UserError for a file that is not such an npz or is damaged, for pickled members, and for statistics of
    another size than Inception's, not finite or not symmetric.
    """
    with _open_archive(path) as archive:
        names = _members(archive)
        missing = [name for name in ("mu", "sigma") if name not in names]
        if missing:
            raise UserError(f"{path} lacks {missing}; it contains {sorted(names)}. Use a reference batch of ADM.")
        spatial = {"mu_s", "sigma_s"} & names
        if len(spatial) == 1:
            raise UserError(f"{path} has only {spatial.pop()} of mu_s and sigma_s. Use the original file.")
        return AdmReference(
            _read_gaussian(archive, path, "mu", "sigma", POOL_DIMENSIONS),
            _read_gaussian(archive, path, "mu_s", "sigma_s", SPATIAL_DIMENSIONS) if spatial else None,
            _image_shape(archive, path) if _IMAGES in names else None,
        )


def count_images(path: Path | str) -> int:
    """The number of images that `read_images` will yield, from the header; 0 if the file has only statistics.

    Raises UserError as `read_images` does.
    """
    with _open_archive(path) as archive:
        return _image_shape(archive, path)[0] if _IMAGES in _members(archive) else 0


def read_images(path: Path | str, chunk_size: int = 256) -> Iterator[NDArray[np.uint8]]:
    """The images of a reference or sample batch in order, uint8 [n <= chunk_size, S, S, 3], one chunk in memory.

    Yields nothing if the file has only statistics. Raises UserError for a file that is not an npz or is damaged, and
    for an arr_0 without images.
    """
    with _open_archive(path) as archive:
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
def _open_archive(path: Path | str) -> Iterator[zipfile.ZipFile]:
    """Open the npz as an archive; errors of a damaged file become a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"the file {path} does not exist. Download the reference batch first.") from error
    except _DAMAGE as error:
        raise UserError(f"{path} is not an npz, or is damaged ({error}). Download it again.") from error


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
    """A member of floats with shape `expected`, as float64."""
    with archive.open(f"{name}.npy") as member:
        shape, is_fortran, dtype = _read_header(member, path, name)
        if len(shape) == len(expected) and shape != expected and len(set(shape)) == 1:
            raise UserError(
                f"{path} contains reference statistics of another feature network: {name} has {shape[0]} dimensions, "
                f"but that of Inception has {expected[0]}. Use statistics of the Inception network of FID."
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
        raise UserError(f"{path}: {_IMAGES} is {dtype} of shape {shape}; uint8 [N, S, S, 3] in C order is expected.")
    return shape[0], shape[1], shape[2], shape[3]


def _read_header(member: IO[bytes], path: Path | str, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an npy member, read up to the start of its values."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(member)
    if version not in readers:
        raise UserError(f"{path}: {name} is in version {version} of the npy format; save it in (1, 0).")
    shape, is_fortran, dtype = readers[version](member)
    if dtype.hasobject:
        raise UserError(
            f"{path}: {name} contains pickled Python objects, which are not loaded. Save it as a plain array."
        )
    return shape, is_fortran, dtype


def _read_exactly(member: IO[bytes], size: int, path: Path | str, name: str) -> bytearray:
    """Read `size` bytes in chunks, so that a header with a wrong, large size allocates no memory."""
    data = bytearray()
    while len(data) < size:
        chunk = member.read(min(_READ_AT_ONCE, size - len(data)))
        if not chunk:
            raise UserError(f"{path}: {name} ends after {len(data):,} of {size:,} bytes. Download it again.")
        data += chunk
    return data


def _check_end(member: IO[bytes], path: Path | str, name: str) -> None:
    """Raise UserError if the member has more bytes. At its end, zipfile raises if the checksum does not match."""
    if member.read(1):
        raise UserError(f"{path}: {name} has more bytes than its header states. Download it again.")
