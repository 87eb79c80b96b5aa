"""Tar shards by our own writer: byte for byte those of webdataset, and read by number."""

from pathlib import Path

import numpy as np
import pytest

from edt_core.data.shards import read_tar, write_tar
from edt_core.data.tar_members import TarRows
from edt_core.errors import UserError

RNG = np.random.default_rng(0)
SAMPLES = [
    (key, {"webp": RNG.bytes(size), "cls": b"%d" % size, "json": b'{"label": 1}'})
    for key, size in [
        *((f"{k:08d}", int(size)) for k, size in enumerate([0, 1, 511, 512, 513, 9728, *RNG.integers(0, 3000, 40)])),
        ("köln", 7),
        ("a/" + "b" * 93, 8),  # the longest name of one field
        ("a" * 60 + "/" + "b" * 80, 9),  # a name of two fields
    ]
]


def by_webdataset(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    from webdataset import TarWriter

    with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
    return path.read_bytes()


@pytest.mark.parametrize("number", [0, 1, 3, 20, len(SAMPLES)])
def test_the_bytes_are_those_of_webdataset(number: int, tmp_path: Path) -> None:
    samples = SAMPLES[-number:] if number else []
    assert write_tar(tmp_path / "ours.tar", samples) == number
    assert (tmp_path / "ours.tar").read_bytes() == by_webdataset(tmp_path / "theirs.tar", samples)


def test_rows_by_number_are_those_in_order(tmp_path: Path) -> None:
    samples = SAMPLES[:46]
    write_tar(tmp_path / "a.tar", samples)
    with TarRows(tmp_path / "a.tar") as rows:
        assert len(rows) == len(samples) == len(list(read_tar(tmp_path / "a.tar")))
        for place in RNG.permutation(len(samples)).tolist():
            assert {name: bytes(data) for name, data in rows[place].items()} == samples[place][1]
    write_tar(tmp_path / "none.tar", [])
    with TarRows(tmp_path / "none.tar") as rows:
        assert len(rows) == 0


@pytest.mark.parametrize("at", [130, 156, 0])
def test_an_archive_of_something_else_is_refused(at: int, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", SAMPLES[6:9])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[at : at + 1] = b"7" if at == 156 else b"." if at == 0 else b"z"
    (tmp_path / "a.tar").write_bytes(data if at else data[:1] + b"x" * 99 + data[100:])
    with pytest.raises(UserError, match="not a shard of samples"):
        TarRows(tmp_path / "a.tar")
