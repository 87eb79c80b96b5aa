"""Archives: a cut or damaged one is never read short, and nothing in one is trusted."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edt_core.config import SourceConfig
from edt_core.data.sources import Listing, list_source
from edt_core.errors import UserError
from edt_core.progress import Silent

JPEG = b"\xff\xd8 not quite a photo"


class Told(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def tar_bytes(members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def sample(key: str, label: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", JPEG + key.encode()), (f"{key}.cls", b"%d\n" % label)]


def listed(path: Path, **options: Any) -> Listing:
    return list_source(SourceConfig(path=str(path), **options))


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message):
        listed(path, **options)


def photo_tar(photos: Path, count: int = 6) -> bytes:
    paths = sorted(photos.glob("*/*.JPEG"))[:count]
    return tar_bytes(
        [part for k, path in enumerate(paths) for part in ((f"{k}.jpg", path.read_bytes()), (f"{k}.cls", b"%d" % k))]
    )


def test_a_cut_archive_is_refused_wherever_it_is_cut(photos: Path, tmp_path: Path) -> None:
    whole = photo_tar(photos)
    end = whole.rstrip(b"\0")
    last = len(end) + (-len(end)) % 512  # where the end-of-archive mark begins
    path = tmp_path / "s.tar"
    path.write_bytes(whole[: last + 512])
    assert len(listed(path)) == 6
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [info.offset for info in tar]
    for cut in {0, 1, 511, 512, 700, *headers[1:], *(h + 100 for h in headers), last - 1, last, last + 511}:
        path.write_bytes(whole[:cut])
        refused(path, "truncated or damaged at byte|no .tar files|empty")


@pytest.mark.parametrize("offset", [0, 130, 156, 300])
def test_a_damaged_header_is_refused_where_tarfile_stops_in_silence(photos: Path, tmp_path: Path, offset: int) -> None:
    whole = bytearray(photo_tar(photos))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        third = tar.getmembers()[4].offset
    whole[third + offset] ^= 0x15
    (tmp_path / "s.tar").write_bytes(whole)
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert len(tar.getmembers()) == 4
    refused(tmp_path / "s.tar", f"s.tar is truncated or damaged at byte {third}")


def test_what_follows_the_end_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(photo_tar(photos) + tar_bytes(sample("x", 0)))
    refused(tmp_path / "s.tar", "has data after its end-of-archive mark")
    zeroed = bytearray(photo_tar(photos))
    with tarfile.open(fileobj=io.BytesIO(zeroed)) as tar:
        third = tar.getmembers()[2].offset
    zeroed[third : third + 512] = bytes(512)
    (tmp_path / "s.tar").write_bytes(zeroed)
    refused(tmp_path / "s.tar", f"mark at byte {third + 512}|mark at byte {third}")


def test_a_cut_class_tar_does_not_run_into_the_next(tmp_path: Path) -> None:
    parts = {f"n0000000{k}": tar_bytes([(f"n0000000{k}_{i}.JPEG", JPEG) for i in range(3)]) for k in range(2)}
    for cut in (1536, 2048, 1030, 3072, 0):
        outer = tar_bytes([("n00000000.tar", parts["n00000000"][:cut]), ("n00000001.tar", parts["n00000001"])])
        (tmp_path / "train.tar").write_bytes(outer)
        refused(tmp_path / "train.tar", r"n00000000\.tar in train\.tar is truncated or damaged at byte")
    outer = tar_bytes([(f"{wnid}.tar", data) for wnid, data in parts.items()])
    (tmp_path / "train.tar").write_bytes(outer)
    assert len(listed(tmp_path / "train.tar")) == 6
    (tmp_path / "train.tar").write_bytes(outer[: outer.rindex(b"n00000001_1.JPEG")])
    refused(tmp_path / "train.tar", "train.tar is truncated or damaged at byte")


def test_a_source_that_becomes_shorter_is_noticed_while_it_is_read(photos: Path, tmp_path: Path) -> None:
    whole = photo_tar(photos)
    (tmp_path / "s.tar").write_bytes(whole)
    listing = listed(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="changed after it was listed"):
        list(listing.images())


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_names(tmp_path: Path, tar_format: int) -> None:
    long = "deep/" * 30 + "x" * 90 if tar_format != tarfile.USTAR_FORMAT else "d" * 80 + "/" + "x" * 90
    keys = [long, "./short", "\u00e4/\u65e5"]
    (tmp_path / "s.tar").write_bytes(tar_bytes([m for k, key in enumerate(keys) for m in sample(key, k)], tar_format))
    images = list(listed(tmp_path / "s.tar").images())
    assert [image.name for image in images] == [f"{key.removeprefix('./')}.jpg" for key in keys]
    assert [image.data for image in images] == [JPEG + key.encode() for key in keys]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*sample("a", 0), *sample("b", 1), ("b.pyd", b"x")], "'b.pyd' in s.tar is a pickle"),
        ([*sample("a", 0), ("c.weights.pth", b"x"), *sample("b", 1)], "'c.weights.pth' in s.tar is a pickle"),
        ([*sample("a", 0), ("b.jpg", JPEG), ("c.jpg", JPEG)], "2 of 3 samples in .* have no label .*'b', 'c'"),
        ([*sample("a", 0), ("b.cls", b"1")], "1 of 2 samples in .* have no image .*'b'"),
        ([*sample("a", 0), *sample("b", 1), *sample("a", 1)], "1 of 3 keys .* occur twice: 'a'"),
        ([*sample("a", 0), *sample("b", 1), ("b.png", JPEG)], "'b' in s.tar has 2 images"),
        ([*sample("a", 0), ("b.jpg", JPEG), ("b.cls", b"cat")], "'b.cls' in s.tar contains b'cat'"),
        ([*sample("a", 0), ("b.jpg", JPEG), ("b.json", b'{"label": true}')], "'b.json' in s.tar contains True"),
        ([*sample("a", 0), ("b.jpg", JPEG), ("b.json", b"{")], "'b.json' in s.tar contains"),
        ([*sample("a", 0), *sample("b", -1)], "1 of 2 images in .* have a label below 0, such as -1"),
        ([*sample("a", 0), *sample("b", 1), ("b.json", b'{"label": 2}')], "'b' in s.tar has the labels 1 and 2"),
        ([*sample("a", 0), *sample("b", 0)], "only one class .*'0', 2 images"),
        ([("a.txt", b"x")], "1 of 1 samples .* have no image"),
        ([], "no images in"),
    ],
)
def test_shards_that_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    refused(tmp_path / "s.tar", message)


def test_links_and_compressed_archives_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    (tmp_path / "s.tar").write_bytes(buffer.getvalue())
    refused(tmp_path / "s.tar", "'b.jpg' in s.tar is a link")
    (tmp_path / "s.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    refused(tmp_path / "s.tar", "s.tar is compressed")


def test_class_names_beside_the_shards(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar_bytes([*sample("a", 0), *sample("b", 2)]))
    assert listed(tmp_path).classes == ("0", "2")
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog", "emu"]))
    assert listed(tmp_path).classes == ("cat", "dog", "emu")
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog"]))
    refused(tmp_path, "label 2 .* beyond the 2 class names")
    (tmp_path / "classes.json").write_text("{}")
    refused(tmp_path, "not a list of class names")


def test_splits_in_one_folder_are_told(tmp_path: Path) -> None:
    told = Told()
    for k, split in enumerate(("train", "val")):
        (tmp_path / f"imagenet-{split}-0.tar").write_bytes(tar_bytes(sample(split, k)))
    list_source(SourceConfig(path=str(tmp_path)), told)
    assert "several splits (train, val)" in told.warnings[0]


def test_ilsvrc_archives_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "n00000001.tar").write_bytes(tar_bytes([("n00000001_1.JPEG", JPEG)]))
    (tmp_path / "n00000001.tar").write_bytes(tar_bytes([("n00000001_1.JPEG", JPEG)]))
    refused(tmp_path, "1 classes are in .* twice: 'n00000001'")
    (tmp_path / "n00000001.tar").write_bytes(tar_bytes([("readme.txt", b"x")]))
    (tmp_path / "a" / "n00000001.tar").unlink()
    refused(tmp_path, "no images in n00000001.tar")
    (tmp_path / "x.tar").write_bytes(tar_bytes([("readme.txt", b"x")]))
    refused(tmp_path / "x.tar", "no class tars", kind="ilsvrc2012")


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_with_plain_columns_reads_only_what_is_listed(photos: Path, tmp_path: Path) -> None:
    data = [path.read_bytes() for path in sorted(photos.glob("*/*.JPEG"))[:40]]
    columns = {"jpg": data, "cls": [f"c{k % 3}" for k in range(40)], "text": ["x"] * 40}
    listing = listed(write_parquet(tmp_path / "x.parquet", columns, row_group_size=17))
    assert listing.classes == ("c0", "c1", "c2")
    assert [image.data for image in listing.images()] == data
    assert [image.data for image in listing.slice(16, 18).images()] == data[16:18]
    assert [image.data for image in listed(tmp_path, classes=("c0", "c2"), limit=9).images()] == [
        [d for k, d in enumerate(data) if k % 3 != 1][i * 27 // 9] for i in range(9)
    ]


def test_parquet_integers_and_dictionaries(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"img": [JPEG, JPEG], "fine_label": pa.array([0, 3], pa.uint8())})
    assert listed(path).classes == ("0", "3")
    write_parquet(path, {"img": [JPEG, None], "label": pa.array(["b", "a"]).dictionary_encode()})
    listing = listed(path)
    assert (listing.classes, listing.table["label"].to_pylist()) == (("a", "b"), [1, 0])
    assert [image.error for image in listing.images()] == [None, "ValueError: the row contains no image"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [JPEG] * 3, "label": [0, 1, -1]}, "1 of 3 images in .* have a label below 0, such as -1.*train-"),
        ({"image": [JPEG] * 3, "label": [0, 1, None]}, "1 of 3 rows of x.parquet have no label"),
        ({"image": [JPEG] * 2, "label": [0.5, 1.0]}, "'label' of x.parquet has the type double"),
        ({"image": ["a", "b"], "label": [0, 1]}, "x.parquet has the columns image, label; it needs an image column"),
        ({"image": [JPEG] * 2, "text": ["a", "b"]}, "has the columns image, text"),
    ],
)
def test_parquet_that_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    refused(write_parquet(tmp_path / "x.parquet", columns), message)


def test_damaged_or_different_parquet_files_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": [JPEG] * 2, "label": [0, 1]})
    write_parquet(tmp_path / "b.parquet", {"image": [JPEG] * 2, "label": ["x", "y"]})
    refused(tmp_path, "a.parquet and b.parquet have different classes")
    data = path.read_bytes()
    for cut in (0, 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        refused(path, "a.parquet is not a complete parquet file")


def test_a_parquet_file_with_fewer_rows_than_listed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": [JPEG] * 4, "label": [0, 1, 0, 1]})
    listing = listed(path)
    write_parquet(path, {"image": [JPEG] * 3, "label": [0, 1, 0]})
    with pytest.raises(UserError, match="changed after it was listed"):
        list(listing.images())
