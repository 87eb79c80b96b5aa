"""Generated samples in the formats that other tools read, each whole or not there at all.

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
_OWN = {"lock", "whole"}  # of the hidden folder that an export is written to
_DIGITS = 6  # of a sample's name, or more where there are more samples: names in order are samples in order
_AGAIN = "make the samples again, or give the number that there is"


def export_samples(
    format: str,
    batches: Iterable[Batch],
    count: int,
    target: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the samples 0..count-1 to `target`, a new folder ("png", "webdataset") or file ("npz").

    png: `000000.png` and so on, and nothing else; the labels lie beside it as `<target>-labels.csv` (file,label).
    webdataset: `samples-00000.tar` and so on, of up to 10,000 samples. Equal samples give equal bytes.

    `batches` are taken one at a time and must not change afterwards. `progress` hears how many samples were taken.
    Until all is written it lies under a hidden name beside `target`, which goes when this fails; what a killed export
    left there goes with the next one to this target.

    Raises UserError where the target is there already or another export writes it, where the indices are not
    0..count-1 in order, where the images are not uint8 [n, S, S, 3] of one size, and where the disk refuses.
    """
    if format not in _WRITERS:
        raise UserError(f"unknown export format {format!r}; choose one of {', '.join(EXPORT_FORMATS)}")
    if count < 1:
        raise UserError(f"{count} samples to export; give 1 or more")
    target = target.expanduser().absolute()
    outputs = [_labels_beside(target), target] if format == "png" else [target]  # what tells that all is there is last
    with _staged(target, outputs) as staging:
        with clear_space_errors(str(target)):  # any other error may come from the code that makes the batches
            _WRITERS[format](_checked(batches, count, progress), count, staging / target.name)
            for _ in in_threads(fsync_file, [path for path in staging.rglob("*") if path.is_file()]):
                pass
        with clear_disk_errors(str(target)):
            _publish(staging, outputs)


def _labels_beside(folder: Path) -> Path:
    """Not inside: the tools take every file of the folder for an image, or warn of it."""
    return folder.with_name(f"{folder.name}-labels.csv")


def _checked(batches: Iterable[Batch], count: int, progress: Callable[[int], None]) -> Iterator[Batch]:
    """The batches, exactly `count` samples in order, of one size; raises UserError where they turn out not to be."""
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
        due = np.arange(done, stop)
        if len(wrong := np.flatnonzero(indices != due)):
            raise UserError(
                f"sample {indices[wrong[0]]} came where sample {due[wrong[0]]} of {count} is due; samples are exported "
                "in order and once each: make them again"
            )
        if stop > count:
            raise UserError(f"{stop} or more samples came where {count} are to be exported; {_AGAIN}")
        yield indices, labels, images
        done = stop
        progress(done)
    if done < count:
        raise UserError(f"{done} samples came where {count} are to be exported; {_AGAIN}")


def _side(images: NDArray[np.uint8]) -> int:
    """S of uint8 [n, S, S, 3]; raises UserError for anything else."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (*images.shape[1:2] * 2, 3):
        raise UserError(
            f"images of type {images.dtype} and shape {list(images.shape)} where uint8 [n, S, S, 3] is to be exported; "
            "convert them to 8-bit RGB squares"
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
    kept: list[NDArray[np.int64]] = []

    def pixels() -> Iterator[NDArray[np.uint8]]:
        for _, labels, images in chain([first], batches):
            kept.append(labels.astype(np.int64))
            yield images

    first = next(batches)
    with ZipFile(path, "w") as archive:
        _write_npy(archive, "arr_0", np.uint8, (count, *first[2].shape[1:]), pixels())
        _write_npy(archive, "arr_1", np.int64, (count,), kept)


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
    # ZipInfo's own date is 1980, where a name alone would get today's; the size is not known beforehand, hence ZIP64.
    with archive.open(ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)


@contextmanager
def _staged(target: Path, outputs: Sequence[Path]) -> Iterator[Path]:
    """An empty folder on the target's file system for this process alone; it goes afterwards with all that is in it.

    Raises UserError where an output is there already or another export holds the folder.
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
            raise UserError(f"another export to {target} is at work; wait for it, or give another target") from None
    try:
        staging = hidden / "whole"
        with clear_disk_errors(str(target)):
            if staging.exists():  # of an export that was killed: nobody holds the lock
                shutil.rmtree(staging)
            staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        lock.release()


def _publish(staging: Path, outputs: Sequence[Path]) -> None:
    """Give the outputs their names, in order; those that have theirs lose them again where another cannot have its."""
    _refuse_existing(outputs)  # writing took its time
    named: list[Path] = []
    try:
        for output in outputs:
            (staging / output.name).rename(output)
            named.append(output)
    except OSError:
        for output in named:
            output.rename(staging / output.name)
        raise
    fsync_file(outputs[-1])


def _refuse_existing(outputs: Iterable[Path]) -> None:
    for output in outputs:
        if os.path.lexists(output):  # a link to nothing is somebody's, too
            raise UserError(f"{output} is there already and stays as it is; give another target, or remove it")


def _refuse_foreign(hidden: Path) -> None:
    """Raise UserError where the hidden folder of an export, which goes at its end, holds what no export has left."""
    if hidden.is_symlink() or (hidden.exists() and (not hidden.is_dir() or {p.name for p in hidden.iterdir()} - _OWN)):
        raise UserError(
            f"{hidden} is where this export would be written first, and it is not of an export; move it elsewhere, or "
            "give another target"
        )


_WRITERS: dict[str, Callable[[Iterator[Batch], int, Path], None]] = {
    "png": _write_png,
    "npz": _write_npz,
    "webdataset": _write_webdataset,
}
EXPORT_FORMATS = tuple(_WRITERS)
