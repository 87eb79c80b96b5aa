"""Exported samples: read back as the other tools read them, whole or not there, the same bytes every time."""

import errno
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image

from edt_core.config import SourceConfig
from edt_core.data import export
from edt_core.data.export import EXPORT_FORMATS, Batch, export_samples
from edt_core.data.sources import list_source
from edt_core.errors import UserError

COUNT, SIDE = 23, 12
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 1000, COUNT)

Change = Callable[[list[Batch]], list[Batch]]


def batches(size: int = 7) -> list[Batch]:
    indices = np.arange(COUNT)
    cuts = [slice(start, start + size) for start in range(0, COUNT, size)]
    return [(indices[cut], LABELS[cut], PIXELS[cut]) for cut in cuts]


def interrupted() -> Iterator[Batch]:
    yield from batches()[:2]
    raise RuntimeError("the sampler stopped")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_png(target: Path) -> tuple[NDArray[np.uint8], list[int]]:
    files = sorted(target.iterdir())
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(COUNT)]
    images = [Image.open(file) for file in files]
    assert {image.mode for image in images} == {"RGB"}
    head, *rows = (target.parent / f"{target.name}-labels.csv").read_text().splitlines()
    assert head == "file,label"
    assert [row.split(",")[0] for row in rows] == [file.name for file in files]
    return np.stack([np.asarray(image) for image in images]), [int(row.split(",")[1]) for row in rows]


def read_npz(target: Path) -> tuple[NDArray[np.uint8], list[int]]:
    with np.load(target, allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert (file["arr_0"].dtype, file["arr_1"].dtype) == (np.uint8, np.int64)
        return file["arr_0"], file["arr_1"].tolist()


def read_webdataset(target: Path) -> tuple[NDArray[np.uint8], list[int]]:
    shards = [str(path) for path in sorted(target.iterdir())]
    read = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls"))
    assert [key for key, _, _ in read] == [f"{index:06d}" for index in range(COUNT)]
    return np.stack([pixels for _, pixels, _ in read]), [label for _, _, label in read]


READERS = {"png": read_png, "npz": read_npz, "webdataset": read_webdataset}


@pytest.mark.parametrize("form", EXPORT_FORMATS)
@pytest.mark.parametrize("size", [1, 7, COUNT])
def test_every_format_reads_back_and_nothing_else_is_there(form: str, size: int, tmp_path: Path) -> None:
    told: list[int] = []
    export_samples(form, batches(size), COUNT, tmp_path / "new" / "samples", told.append)
    pixels, labels = READERS[form](tmp_path / "new" / "samples")
    assert np.array_equal(pixels, PIXELS)
    assert labels == LABELS.tolist()
    assert told[-1] == COUNT
    assert told == sorted(told)
    beside = {"samples", "samples-labels.csv"} if form == "png" else {"samples"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == beside


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_equal_samples_give_equal_bytes_however_they_are_batched(form: str, tmp_path: Path) -> None:
    for name, size in (("a", 7), ("b", 5)):
        export_samples(form, batches(size), COUNT, tmp_path / name / "samples")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_archive_says_nothing_of_the_day_or_the_user(tmp_path: Path) -> None:
    export_samples("npz", batches(), COUNT, tmp_path / "s.npz")
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        assert {info.date_time[:3] for info in archive.infolist()} == {(1980, 1, 1)}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None
    export_samples("webdataset", batches(), COUNT, tmp_path / "w")
    with tarfile.open(tmp_path / "w" / "samples-00000.tar") as tar:
        assert {(info.mtime, info.uname, info.uid) for info in tar} == {(0, "", 0)}


def test_the_evaluators_stream_is_the_array(tmp_path: Path) -> None:
    """The evaluator of ADM reads the header as version 1.0 and then the rows from the open member."""
    export_samples("npz", batches(), COUNT, tmp_path / "s.npz")
    with zipfile.ZipFile(tmp_path / "s.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        assert (shape, fortran, dtype) == (PIXELS.shape, False, np.uint8)
        assert file.read() == PIXELS.tobytes()


def test_the_shards_are_a_source_of_labelled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_SHARD_SAMPLES", 10)
    export_samples("webdataset", batches(), COUNT, tmp_path / "w")
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == [f"samples-{k:05d}.tar" for k in range(3)]
    listing = list_source(SourceConfig(path=str(tmp_path / "w")))
    assert listing.table["name"].to_pylist() == [b"%06d.png" % index for index in range(COUNT)]
    assert np.array_equal(read_webdataset(tmp_path / "w")[0], PIXELS)


def test_names_in_order_are_samples_in_order_beyond_a_million() -> None:
    assert export._name(7, 1_000_000) == "000007"
    assert export._name(7, 1_000_001) == "0000007"


def test_npz_batches_are_not_kept(tmp_path: Path) -> None:
    """All batches are views of one buffer: had they been collected first, every image would be the last one."""
    buffer = np.empty((1, SIDE, SIDE, 3), np.uint8)

    def reusing() -> Iterator[Batch]:
        for index in range(COUNT):
            buffer[:] = PIXELS[index]
            yield np.array([index]), LABELS[index : index + 1], buffer

    export_samples("npz", reusing(), COUNT, tmp_path / "s.npz")
    assert np.array_equal(read_npz(tmp_path / "s.npz")[0], PIXELS)


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_an_interrupted_export_leaves_nothing_and_the_next_one_works(form: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the sampler stopped"):
        export_samples(form, interrupted(), COUNT, tmp_path / "samples")
    assert list(tmp_path.iterdir()) == []
    export_samples(form, batches(), COUNT, tmp_path / "samples")
    assert np.array_equal(READERS[form](tmp_path / "samples")[0], PIXELS)


@pytest.mark.faults
def test_a_killed_export_leaves_a_hidden_folder_that_the_next_one_removes(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib, numpy as np\n"
        "from edt_core.data.export import export_samples\n"
        "def batches():\n"
        "    for index in range(50):\n"
        "        yield np.array([index]), np.array([0]), np.zeros((1, 8, 8, 3), np.uint8)\n"
        "    os._exit(9)\n"
        "export_samples('png', batches(), 99, pathlib.Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "samples")], check=False)
    assert done.returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".samples.exporting"]
    assert len(list((tmp_path / ".samples.exporting").rglob("*.png"))) > 10
    export_samples("png", batches(), COUNT, tmp_path / "samples")
    assert np.array_equal(read_png(tmp_path / "samples")[0], PIXELS)
    assert {path.name for path in tmp_path.iterdir()} == {"samples", "samples-labels.csv"}


def test_two_exports_to_one_target_do_not_meet(tmp_path: Path) -> None:
    def meanwhile() -> Iterator[Batch]:
        with pytest.raises(UserError, match="another export"):
            export_samples("png", batches(), COUNT, tmp_path / "samples")
        yield from batches()

    export_samples("png", meanwhile(), COUNT, tmp_path / "samples")
    assert np.array_equal(read_png(tmp_path / "samples")[0], PIXELS)


@pytest.mark.parametrize("form", EXPORT_FORMATS)
@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing"])
def test_what_is_there_is_refused_and_stays(form: str, kind: str, tmp_path: Path) -> None:
    target = tmp_path / "samples"
    if kind == "file":
        target.touch()
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    before = target.lstat()
    with pytest.raises(UserError, match="samples exists and is not overwritten"):
        export_samples(form, batches(), COUNT, target)
    assert target.lstat() == before
    assert list(tmp_path.iterdir()) == [target]


def test_labels_that_are_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "samples-labels.csv").write_text("mine")
    with pytest.raises(UserError, match=r"samples-labels\.csv exists and is not overwritten"):
        export_samples("png", batches(), COUNT, tmp_path / "samples")
    assert contents(tmp_path) == {"samples-labels.csv": b"mine"}


@pytest.mark.parametrize("form", EXPORT_FORMATS)
def test_a_target_that_comes_meanwhile_stays_too(form: str, tmp_path: Path) -> None:
    def meanwhile() -> Iterator[Batch]:
        yield from batches()
        (tmp_path / "samples").write_text("mine")

    with pytest.raises(UserError, match="samples exists and is not overwritten"):
        export_samples(form, meanwhile(), COUNT, tmp_path / "samples")
    assert contents(tmp_path) == {"samples": b"mine"}


def test_labels_go_again_where_the_folder_cannot_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_refuse_existing", lambda outputs: None)
    (tmp_path / "samples").write_text("mine")
    with pytest.raises(UserError, match="a part of this path is a file"):
        export_samples("png", batches(), COUNT, tmp_path / "samples")
    assert contents(tmp_path) == {"samples": b"mine"}


WRONG: dict[str, tuple[Change, str]] = {
    "order": (lambda b: [b[1], b[0], *b[2:]], "got sample 7 instead of sample 0 of 23"),
    "missing": (lambda b: [b[0], *b[2:]], "got sample 14 instead of sample 7 of 23"),
    "twice": (lambda b: [b[0], b[0], *b[1:]], "got sample 0 instead of sample 7 of 23"),
    "too few": (lambda b: b[:-1], "got 21 samples, expected 23"),
    "none": (lambda b: [], "got 0 samples, expected 23"),
    "too many": (lambda b: [*b, (np.array([23]), LABELS[:1], PIXELS[:1])], "got 24 or more samples, expected 23"),
    "type": (lambda b: [(b[0][0], b[0][1], b[0][2] / np.float32(255))], "type float32 and shape"),  # type: ignore[list-item]
    "channels first": (lambda b: [(b[0][0], b[0][1], b[0][2].transpose(0, 3, 1, 2))], r"shape \[7, 3, 12, 12\]"),
    "oblong": (lambda b: [(b[0][0], b[0][1], b[0][2][:, :8])], r"shape \[7, 8, 12, 3\]"),
    "one image": (lambda b: [(b[0][0], b[0][1], b[0][2][0])], r"shape \[12, 12, 3\]"),
    "sizes": (lambda b: [b[0], (b[1][0], b[1][1], b[1][2][:, :8, :8])], "8 px after those of 12 px"),
    "labels": (lambda b: [(b[0][0], b[0][1][:6], b[0][2])], r"7 images with .* labels \[6\]"),
}


@pytest.mark.parametrize("form", EXPORT_FORMATS)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_samples_are_refused_and_nothing_is_left(form: str, what: str, tmp_path: Path) -> None:
    change, message = WRONG[what]
    with pytest.raises(UserError, match=message):
        export_samples(form, change(batches()), COUNT, tmp_path / "samples")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_order_is_refused() -> None:
    for form, count, message in (("zip", 1, "choose one of png, npz, webdataset"), ("png", 0, "0 samples to export")):
        with pytest.raises(UserError, match=message):
            export_samples(form, [], count, Path("/nowhere"))


@pytest.mark.parametrize(
    ("form", "writer"),
    [("png", "encode_png"), ("npz", "_write_npy"), ("webdataset", "write_tar"), ("png", "fsync_file")],
)
def test_a_full_disk_is_one_message(form: str, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, writer, full)
    with pytest.raises(UserError, match=r"cannot write to .*/samples: no space is left on the device"):
        export_samples(form, batches(), COUNT, tmp_path / "samples")
    assert list(tmp_path.iterdir()) == []


def test_what_the_sampler_may_not_read_is_not_said_of_the_target(tmp_path: Path) -> None:
    def locked() -> Iterator[Batch]:
        yield from batches()[:1]
        raise PermissionError(errno.EACCES, "Permission denied", "features")

    with pytest.raises(PermissionError, match="features"):
        export_samples("npz", locked(), COUNT, tmp_path / "samples")
