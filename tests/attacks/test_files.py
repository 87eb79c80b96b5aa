"""Files of a source and of a store that a stranger made: quarantined or refused, with little memory and in time."""

import io
import os
import socket
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.images import MAX_IMAGE_BYTES, encode_png
from edt_core.data.sources import list_source, reading, source_identity
from edt_core.errors import UserError
from edt_core.files.small_files import MAX_RECORD_BYTES, UnusableFileError, parse_json, read_bounded
from edt_core.store.artifact import Artifact, ManifestError
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.manifest import Manifest
from edt_core.store.store import Store
from jobs.stages.reuse.image_shard import prepare
from tests.support.small import edt
from tests.support.sources import tar_bytes

_MIB = 1 << 20
PNG = encode_png(Image.new("RGB", (40, 40), "red"))


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """Most bytes that Python's allocators held since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def sparse(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def folder_of(root: Path, **files: bytes) -> Path:
    """Two classes with an image each, and files of the first one."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "good.png").write_bytes(PNG)
    for name, data in files.items():
        (root / "a" / f"{name}.png").write_bytes(data)
    return root


# Records.


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


RECORDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (_fifo, "is a FIFO"),
    "socket": (_socket, "is a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "folder": (Path.mkdir, "is a folder"),
    "10 GB of nothing": (lambda path: sparse(path, 10 << 30), "has 10,737,418,240 bytes"),
    "100,000 brackets": (lambda path: path.write_bytes(b"[" * 100_000), "is not a valid manifest"),
    "100,000 digits": (lambda path: path.write_bytes(b"9" * 100_000), "is not a valid manifest"),
    "Latin-1": (lambda path: path.write_bytes(b'{"kind": "\xe9"}'), "is not a valid manifest"),
    "empty": (lambda path: path.write_bytes(b""), "is not a valid manifest"),
    "a NUL": (lambda path: path.write_bytes(b"\0"), "is not a valid manifest"),
    "not a number": (lambda path: path.write_bytes(b'{"schema_version": NaN}'), "schema version nan"),
    "loop": (lambda path: path.symlink_to(path), "symbolic links"),
}


@pytest.mark.parametrize(("make", "message"), RECORDS.values(), ids=RECORDS)
def test_what_is_no_manifest_is_a_damaged_artifact(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "store" / "images" / ("f" * 64)
    folder.mkdir(parents=True)
    make(folder / MANIFEST_NAME)
    with pytest.raises(UserError, match=message):
        Artifact.read(Folder.at(folder))
    done = edt("verify", str(folder))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    done = edt("artifacts", "--store", str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    assert list(Store(Folder.at(tmp_path / "store")).artifacts()) == []


def test_a_manifest_that_is_a_fifo_is_replaced_by_the_next_run(latents_artifact: Artifact, tmp_path: Path) -> None:
    place = tmp_path / MANIFEST_NAME
    os.mkfifo(place)
    assert Folder.at(tmp_path).write_bytes(MANIFEST_NAME, latents_artifact.manifest.to_json().encode())
    assert Artifact.read(Folder.at(tmp_path)).manifest == latents_artifact.manifest


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[" * 100_000, "9" * 100_000, '{"seal": Infinity}'])
def test_a_manifest_of_odd_json_is_refused(text: str) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(text, "manifest.json")


def test_a_file_that_grows_while_it_is_read_is_read_to_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100)
    small = os.stat(path)
    path.write_bytes(b"x" * 5000)
    monkeypatch.setattr(os, "fstat", lambda handle: small)
    monkeypatch.setattr(os, "stat", lambda name: small)
    with pytest.raises(UnusableFileError, match="more than 1,000"):
        read_bounded(path, 1000)


def test_a_limit_is_not_one_too_low(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 1000)
    assert len(read_bounded(tmp_path / "f", 1000)) == 1000
    with pytest.raises(UnusableFileError):
        read_bounded(tmp_path / "f", 999)
    assert MAX_RECORD_BYTES > 10_000 * 10_000  # a manifest with all quarantined images under the longest paths


@pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 100_000, b"\xff", b"", b"{'a': 1}"])
def test_json_of_any_bytes_is_a_value_or_one_message(text: bytes) -> None:
    with pytest.raises(UnusableFileError, match=r"^x is not (usable )?JSON"):
        parse_json(text, "x")


# Images.


def test_an_image_file_that_is_too_large_is_quarantined_unread(tmp_path: Path, peak: Callable[[], int]) -> None:
    root = folder_of(tmp_path / "data")
    for name in ("a/huge.png", "b/huge.png"):
        sparse(root / name, 1_500_000_000)
    listing = list_source(SourceConfig(path=str(root)))
    identity = source_identity(listing)
    images = {image.name: image for image in listing.images()}
    assert images["a/huge.png"].data is None
    assert images["a/huge.png"].error == (
        f"ValueError: 1,500,000,000 bytes, more than the limit of {MAX_IMAGE_BYTES:,} for one image"
    )
    assert images["a/good.png"].data == PNG
    assert peak() < 64 * _MIB
    sparse(root / "a/huge.png", 1_600_000_000)
    assert source_identity(list_source(SourceConfig(path=str(root)))) == identity, "what is not read counts alike"


def test_large_images_are_not_read_ahead_all_at_once(
    tmp_path: Path, peak: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(reading, "_AHEAD_BYTES", 16 << 20)
    root = folder_of(tmp_path / "data")
    for number in range(40):
        sparse(root / f"a/{number:02d}.png", 8 * _MIB)
    read = [image.name for image in list_source(SourceConfig(path=str(root))).images()]
    assert read == sorted(read)
    assert len(read) == 42
    assert peak() < 64 * _MIB, "40 images of 8 MiB are 320"


def test_a_file_that_changes_after_it_was_listed_is_told(tmp_path: Path) -> None:
    for data in (PNG + b"x", PNG[:-1], b""):
        root = folder_of(tmp_path / str(len(data)), other=PNG)
        listing = list_source(SourceConfig(path=str(root)))
        (root / "a/other.png").write_bytes(data)
        with pytest.raises(UserError, match="changed after it was listed"):
            list(listing.images())


@pytest.mark.parametrize(
    "image_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO", "AVIF", "JPEG2000"]
)
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_an_image_that_is_empty_or_cut_raises_what_is_quarantined(image_format: str, part: float) -> None:
    buffer = io.BytesIO()
    try:
        Image.effect_noise((64, 64), 90).convert("RGB").save(buffer, image_format)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {image_format}")
    data = buffer.getvalue()
    with pytest.raises(Exception) as raised:  # noqa: PT011  of any class: preprocess quarantines them all
        prepare(data[: int(len(data) * part)], PreprocessConfig(image_size=32))
    assert not isinstance(raised.value, MemoryError | RecursionError)


# Archives.


def _with_long_header(kind: bytes, size: int) -> bytes:
    """The first block of a tar whose first header states a pax header or a long name of this size."""
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_tar_whose_header_is_gigabytes_is_damaged(kind: bytes, tmp_path: Path, peak: Callable[[], int]) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(_with_long_header(kind, 2 << 30))
    with path.open("r+b") as file:
        file.truncate(3 << 30)
    with pytest.raises(UserError, match="is truncated or damaged"):
        list_source(SourceConfig(path=str(path), kind="webdataset"))
    assert peak() < 64 * _MIB


def test_a_tar_member_that_is_too_large_is_quarantined(tmp_path: Path, peak: Callable[[], int]) -> None:
    info = tarfile.TarInfo("b.png")
    info.size = 1 << 30
    path = tmp_path / "s.tar"
    with path.open("wb") as file:
        # b's label comes before its image: members of a sample lie together
        file.write(tar_bytes([("a.png", PNG), ("a.cls", b"0")])[: 4 * 512])
        file.write(tar_bytes([("b.cls", b"1")])[: 2 * 512])
        file.write(info.tobuf())
        file.seek(info.size, os.SEEK_CUR)
        file.write(bytes(1024))
    images = list(list_source(SourceConfig(path=str(path))).images())
    assert [image.data is None for image in images] == [False, True]
    assert "more than the" in str(images[1].error)
    assert peak() < 64 * _MIB


# Parquet.


def _write_parquet(path: Path, images: pa.Array, labels: pa.Array, **options: object) -> None:
    pq.write_table(pa.table({"image": images, "label": labels}), path, **options)


def _images_of(path: Path) -> list[reading.RawImage]:
    return list(list_source(SourceConfig(path=str(path))).images())


def test_a_parquet_bomb_is_refused_before_it_expands(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    zeros = pa.array([bytes(64 * _MIB)] * 6, pa.binary())
    _write_parquet(path, zeros, pa.array([0, 1] * 3), compression="zstd", use_dictionary=False)
    assert path.stat().st_size < _MIB
    before = pa.total_allocated_bytes()
    del zeros
    with pytest.raises(UserError, match="a decompression bomb"):
        _images_of(path)
    assert pa.total_allocated_bytes() <= before


def test_a_value_that_each_row_repeats_is_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "repeats.parquet"
    large = os.urandom(20 * _MIB)
    _write_parquet(
        path, pa.array([large] * 40, pa.binary()), pa.array([0, 1] * 20), dictionary_pagesize_limit=64 * _MIB
    )
    assert path.stat().st_size < 30 * _MIB
    asked: list[int] = []
    read = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: asked.append(a[1]) or read(*a, **k))
    count = sum(image.data == large for image in list_source(SourceConfig(path=str(path))).images())
    assert (count, asked) == (40, [1])


def test_a_row_that_is_too_large_is_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_IMAGE_BYTES", 1000)
    path = tmp_path / "large.parquet"
    _write_parquet(path, pa.array([PNG[:900], b"x" * 1001], pa.binary()), pa.array([0, 1]))
    first, second = _images_of(path)
    assert first.data == PNG[:900]
    assert (second.data, second.error) == (None, "ValueError: 1,001 bytes, more than the limit of 1,000 for one image")
    monkeypatch.setattr(reading, "_MAX_ONE_ROW", 1000)
    _write_parquet(path, pa.array([PNG[:900], b"x" * 1001], pa.binary()), pa.array([0, 1]), row_group_size=1)
    assert [image.data is None for image in _images_of(path)] == [False, True]


def test_labels_that_are_long_or_countless_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.parquet"
    _write_parquet(path, pa.array([PNG] * 4, pa.binary()), pa.array(["x" * 5000, "y"] * 2))
    with pytest.raises(UserError, match="labels of more than 4,096 bytes"):
        _images_of(path)
    monkeypatch.setattr("edt_core.data.sources.parquet._MAX_ROWS", 3)
    _write_parquet(path, pa.array([PNG] * 4, pa.binary()), pa.array(["x", "y"] * 2))
    with pytest.raises(UserError, match="has 4 rows, but a file may have at most 3"):
        _images_of(path)


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
@pytest.mark.parametrize("part", [0.0, 0.3])
def test_an_archive_that_is_empty_or_cut_is_refused(name: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".tar"):
        path.write_bytes(tar_bytes([("a.png", PNG), ("a.cls", b"0"), ("b.png", PNG), ("b.cls", b"1")]))
    else:
        _write_parquet(path, pa.array([PNG] * 4, pa.binary()), pa.array([0, 1] * 2))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError):
        list_source(SourceConfig(path=str(path)))


def test_metadata_of_a_schema_that_is_nested_without_end_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "nested.parquet"
    table = pa.table({"image": pa.array([PNG] * 2, pa.binary()), "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": "[" * 100_000}), path)
    assert len(_images_of(path)) == 2


# Labels and class names.


@pytest.mark.parametrize("data", [b"[" * 100_000, b"", b"\xff\xfe", b"9" * 100_000, b'["a", NaN]'])
def test_class_names_of_odd_json_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar_bytes([("a.png", PNG), ("a.cls", b"0"), ("b.png", PNG), ("b.cls", b"1")]))
    (tmp_path / "classes.json").write_bytes(data)
    with pytest.raises(UserError, match="next to the archives"):
        list_source(SourceConfig(path=str(tmp_path)))


LABELS = {
    "labels.json": (
        b"[" * 100_000,
        b"9" * 100_000,
        b"",
        b"\0",
        b'{"a/good.png": NaN}',
        b'{"a/good.png": 1, "a/good.png": 2}',
    ),
    "labels.csv": (b"", b"\0", b"file_name,label\na/good.png", b'file_name,label\n"a/good', b"x" * 200_000),
    "metadata.jsonl": (b"", b"[" * 100_000, b"{", b"\0"),
}


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, several in LABELS.items() for data in several])
def test_labels_of_odd_bytes_are_refused(name: str, data: bytes, tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data")
    (root / name).write_bytes(data)
    with pytest.raises(UserError):
        list_source(SourceConfig(path=str(root), kind="labels"))


@pytest.mark.parametrize("make", [_fifo, _socket, Path.mkdir, lambda path: sparse(path, 10 << 30)])
def test_labels_that_are_no_plain_file_are_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data")
    make(root / "labels.csv")
    with pytest.raises(UserError):
        list_source(SourceConfig(path=str(root), kind="labels", labels="labels.csv"))


def test_labels_of_an_editor_are_read(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data")
    (root / "labels.csv").write_bytes("\ufefffile_name,label\r\na/good.png,1\r\nb/good.png,2\r\n".encode())
    assert list_source(SourceConfig(path=str(root), kind="labels")).classes == ("1", "2")


# Names and rights.


def test_names_as_long_as_a_file_system_takes_are_read(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data")
    (root / "a" / ("n" * 251 + ".png")).write_bytes(PNG)
    deep = root / "b"
    for _ in range(12):
        deep = deep / ("d" * 250)
    os.makedirs(deep)
    (deep / "x.png").write_bytes(PNG)
    listing = list_source(SourceConfig(path=str(root), class_folder="first"))
    assert [image.data == PNG for image in listing.images()] == [True] * 4


@pytest.mark.parametrize("path", ["/" + "x" * 300, "/" + "y/" * 2100, "a\0b"], ids=["name", "path", "NUL"])
@pytest.mark.parametrize(
    "command",
    [
        ["preprocess", "PATH", "out"],
        ["verify", "PATH"],
        ["artifacts", "--store", "PATH"],
        ["export", "PATH", "out.npz"],
        ["sample", "PATH", "--out", "o.png"],
        ["import", "PATH"],
        ["encode", "PATH", "out", "--autoencoder", "PATH"],
    ],
    ids=lambda words: words[0],
)
def test_paths_that_no_file_has_are_refused(path: str, command: list[str], tmp_path: Path) -> None:
    done = edt(*[word.replace("PATH", path) for word in command], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "bug in this program" not in done.stderr
