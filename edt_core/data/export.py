"""Exports generated samples, atomically, in formats that other tools read.

png         a flat folder of PNGs, as torch-fidelity, clean-fid and pytorch-fid read it
npz         arr_0 uint8 [N, S, S, 3] and arr_1 int64 [N], as the evaluator of openai/guided-diffusion reads it
webdataset  tars of `<index>.png` and `<index>.cls` (github.com/webdataset/webdataset, "The WebDataset Format")
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from edt_core.data.images import encode_png
from edt_core.data.shards import write_tar
from edt_core.data.sources.reading import ahead
from edt_core.errors import UserError
from edt_core.store.errors import clear_disk_errors, clear_space_errors
from edt_core.store.folder import fsync_file, in_threads
from edt_core.store.layout import CLASS_MEMBER, IMAGE_MEMBERS

Batch = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]  # indices [n], labels [n], images [n, S, S, 3]
Sample = tuple[int, int, NDArray[np.uint8]]  # index, label, image [S, S, 3]

_SHARD, _SHARD_SAMPLES = "samples-{:05d}.tar", 10_000
_OWN = {"lock", "whole"}  # content of the hidden folder that an export is written to
_DIGITS = 6  # in a sample's name, more for more samples, so that names sort like samples
_AGAIN = "sample again, or export the number of samples that exist"


def export_samples(
    format: str,
    batches: Iterable[Batch],
    count: int,
    target: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the samples 0..count-1 to `target`, a new folder ("png", "webdataset") or file ("npz").

    png: only `000000.png` and so on; the labels are next to the folder as `<target>-labels.csv` (file,label).
    webdataset: `samples-00000.tar` and so on, of up to 10,000 samples. Equal samples give equal bytes.

    `batches` are consumed one at a time and must not change afterwards. `progress` gets the number of samples so far.
    The export is written under a hidden name next to `target` and renamed when complete. On failure the hidden files
    are removed; those of a killed export are removed by the next export to this target.

    Raises UserError if the target exists or another export writes it, if the indices are not 0..count-1 in order, if
    the images are not uint8 [n, S, S, 3] of one size, and for errors of the disk.
    """
    if format not in _WRITERS:
        raise UserError(f"unknown export format {format!r}; choose one of {', '.join(EXPORT_FORMATS)}")
    if count < 1:
        raise UserError(f"{count} samples to export; give 1 or more")
    target = target.expanduser().absolute()
    outputs = [_labels_beside(target), target] if format == "png" else [target]  # the target last: it marks completion
    with _staged(target, outputs) as staging:
        with clear_space_errors(str(target)):  # other errors may come from the code that produces the batches
            _WRITERS[format](_checked(batches, count, progress), count, staging / target.name)
            for _ in in_threads(fsync_file, [path for path in staging.rglob("*") if path.is_file()]):
                pass
        with clear_disk_errors(str(target)):
            _publish(staging, outputs)


def _labels_beside(folder: Path) -> Path:
    """Path of the labels, not inside the folder: tools read every file in it as an image, or warn about it."""
    return folder.with_name(f"{folder.name}-labels.csv")


def _checked(batches: Iterable[Batch], count: int, progress: Callable[[int], None]) -> Iterator[Batch]:
    """The batches. Raises UserError unless they have exactly `count` samples in order and of one size."""
    done, side = 0, 0
    for indices, labels, images in batches:
        side = side or _side(images)
        if _side(images) != side:
            raise UserError(f"images of {_side(images)} px after those of {side} px; all samples must have one size")
        stop = done + len(images)
        if indices.shape != (len(images),) or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{len(images)} images with indices {list(indices.shape)} and {labels.dtype} labels "
                f"{list(labels.shape)}; each image needs one index and one whole number as label"
            )
        expected = np.arange(done, stop)
        if len(wrong := np.flatnonzero(indices != expected)):
            raise UserError(
                f"got sample {indices[wrong[0]]} instead of sample {expected[wrong[0]]} of {count}; samples must come "
                "in order and once each: sample again"
            )
        if stop > count:
            raise UserError(f"got {stop} or more samples, expected {count}; {_AGAIN}")
        yield indices, labels, images
        done = stop
        progress(done)
    if done < count:
        raise UserError(f"got {done} samples, expected {count}; {_AGAIN}")


def _side(images: NDArray[np.uint8]) -> int:
    """S of uint8 [n, S, S, 3]; raises UserError for anything else."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (*images.shape[1:2] * 2, 3):
        raise UserError(
            f"images have type {images.dtype} and shape {list(images.shape)}, but only uint8 [n, S, S, 3] can be "
            "exported; convert them to 8-bit RGB squares"
        )
    return int(images.shape[1])


def _samples(batches: Iterable[Batch]) -> Iterator[Sample]:
    for indices, labels, images in batches:
        yield from zip(indices.tolist(), labels.tolist(), images, strict=True)


def _name(index: int, count: int) -> str:
    return f"{index:0{max(_DIGITS, len(str(count - 1)))}d}"


def _write_png(batches: Iterator[Batch], count: int, folder: Path) -> None:
    def write(sample: Sample) -> str:
        index, label, image = sample
        name = f"{_name(index, count)}.png"
        (folder / name).write_bytes(encode_png(Image.fromarray(image)))
        return f"{name},{label}\n"

    folder.mkdir()
    with _labels_beside(folder).open("w", encoding="utf-8", newline="") as file:
        file.write("file,label\n")
        file.writelines(ahead(write, _samples(batches)))


def _write_npz(batches: Iterator[Batch], count: int, path: Path) -> None:
    """Batch by batch: 50,000 samples of 256 px are 9.8 GB."""
    all_labels: list[NDArray[np.int64]] = []

    def pixels() -> Iterator[NDArray[np.uint8]]:
        for _, labels, images in chain([first], batches):
            all_labels.append(labels.astype(np.int64))
            yield images

    first = next(batches)
    with ZipFile(path, "w") as archive:
        _write_npy(archive, "arr_0", np.uint8, (count, *first[2].shape[1:]), pixels())
        _write_npy(archive, "arr_1", np.int64, (count,), all_labels)


def _write_webdataset(batches: Iterator[Batch], count: int, folder: Path) -> None:
    def members(sample: Sample) -> tuple[str, dict[str, bytes]]:
        index, label, image = sample
        png = encode_png(Image.fromarray(image))
        return _name(index, count), {IMAGE_MEMBERS["png"]: png, CLASS_MEMBER: b"%d" % label}

    folder.mkdir()
    encoded = ahead(members, _samples(batches))
    for shard, first in enumerate(encoded):
        write_tar(folder / _SHARD.format(shard), chain([first], islice(encoded, _SHARD_SAMPLES - 1)))


def _write_npy(
    archive: ZipFile, name: str, dtype: DTypeLike, shape: tuple[int, ...], parts: Iterable[NDArray[np.generic]]
) -> None:
    """Add an array whose rows come in parts. Format: NEP 1, version 1.0."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    # ZipInfo's date is 1980, a plain name would get today's; the size is not known beforehand, so ZIP64.
    with archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)


@contextmanager
def _staged(target: Path, outputs: Sequence[Path]) -> Iterator[Path]:
    """An empty temporary folder on the target's file system for this process alone.

    Raises UserError if an output exists or another export uses the folder.
    """
    from filelock import FileLock, Timeout

    _refuse_existing(outputs)
    hidden = target.with_name(f".{target.name}.exporting")
    _refuse_foreign(hidden)
    with clear_disk_errors(str(target)):
        hidden.mkdir(parents=True, exist_ok=True)
        lock = FileLock(hidden / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another export to {target} is running; wait for it, or give another target") from None
    try:
        staging = hidden / "whole"
        with clear_disk_errors(str(target)):
            if staging.exists():  # of a killed export, which no longer holds the lock
                shutil.rmtree(staging)
            staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        lock.release()


def _publish(staging: Path, outputs: Sequence[Path]) -> None:
    """Rename the outputs to their names, in order; if one fails, rename the earlier ones back."""
    _refuse_existing(outputs)  # again, because writing takes long
    renamed: list[Path] = []
    try:
        for output in outputs:
            (staging / output.name).rename(output)
            renamed.append(output)
    except OSError:
        for output in renamed:
            output.rename(staging / output.name)
        raise
    fsync_file(outputs[-1])


def _refuse_existing(outputs: Iterable[Path]) -> None:
    for output in outputs:
        if os.path.lexists(output):  # also a broken link
            raise UserError(f"{output} exists and is not overwritten; give another target, or remove it")


def _refuse_foreign(hidden: Path) -> None:
    """Raise UserError if the hidden folder of an export, which is removed at its end, contains other files."""
    if hidden.is_symlink() or (hidden.exists() and (not hidden.is_dir() or {p.name for p in hidden.iterdir()} - _OWN)):
        raise UserError(
            f"{hidden} is needed for the files of this export, but it does not belong to an export; move it elsewhere, "
            "or give another target"
        )


_WRITERS: dict[str, Callable[[Iterator[Batch], int, Path], None]] = {
    "png": _write_png,
    "npz": _write_npz,
    "webdataset": _write_webdataset,
}
EXPORT_FORMATS = tuple(_WRITERS)
