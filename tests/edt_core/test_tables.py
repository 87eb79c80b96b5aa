"""Tables of many rows: sorted on the disk, mapped, released, and what a plan of many images takes."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from edt_core.data.sources import Listing
from edt_core.data.sources.files import as_text
from edt_core.data.sources.listing import combine_identity, duplicates, listing_identity
from edt_core.data.tables import DigestRows, MappedTable, Sorter, arrow_file, digest_rows, mapped, sorting
from edt_core.store.folder import Folder

SCHEMA = pa.schema([("name", pa.binary()), ("size", pa.int64())])
ROWS = 64


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Batches of few rows, so that small tables are in files; a cache of the test's own."""
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "cache"))
    for module in (sorting, digest_rows, arrow_file):
        monkeypatch.setattr(module, "ROWS", ROWS)
    monkeypatch.setattr(sorting, "_SAMPLE", 4)


def table(names: list[bytes]) -> pa.Table:
    return pa.table({"name": pa.array(names, pa.binary()), "size": pa.array(map(len, names), pa.int64())})


def in_order(names: list[bytes], step: int) -> MappedTable:
    with Sorter(SCHEMA, "name") as sorter:
        for first in range(0, len(names), step):
            sorter.add(table(names[first : first + step]))
        return sorter.finish()


@pytest.mark.parametrize("number", [0, 1, ROWS, ROWS + 1, 20 * ROWS + 3])
@pytest.mark.parametrize("order", ["sorted", "by folder", "random", "all the same"])
def test_rows_come_in_order_however_they_arrive(number: int, order: str) -> None:
    rng = np.random.default_rng(number)
    names = [b"%03d/%s" % (k // 7, bytes(rng.integers(0, 256, 3, dtype=np.uint8))) for k in range(number)]
    if order == "sorted":
        names.sort()
    elif order == "by folder":
        names = [name for k in rng.permutation(number // 7 + 1) for name in names[7 * k : 7 * k + 7]]
    elif order == "random":
        rng.shuffle(names)
    else:
        names = [b"x"] * number
    rows = in_order(names, 10)
    assert rows.table["name"].to_pylist() == sorted(names)
    assert rows.table["size"].to_pylist() == [len(name) for name in sorted(names)]
    if order != "all the same":
        assert max([0, *(len(batch) for batch in rows.batches())]) <= 4 * ROWS


def test_what_was_released_is_read_again_and_no_file_is_left(tmp_path: Path) -> None:
    names = [b"%06d" % k for k in range(10 * ROWS)]
    rows = mapped((batch for batch in table(names).to_batches(max_chunksize=ROWS)), SCHEMA)
    assert len(rows.table.to_batches()) == 10
    for _ in range(2):
        assert [name for batch in rows.batches("name") for name in batch.column(0).to_pylist()] == names
    rows.pages.release()
    assert rows.table["name"][ROWS + 1].as_py() == names[ROWS + 1]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert pickle.loads(pickle.dumps(rows)).table.equals(rows.table)


def test_rows_at_places_are_taken_batch_by_batch() -> None:
    whole = table([b"%06d" % k for k in range(10 * ROWS)])
    rows = mapped(whole.to_batches(max_chunksize=ROWS), SCHEMA)
    for places in ([], [5], [0, 0, 63, 64, 639], range(0, 640, 3)):
        taken = rows.take(np.array(places, np.int64))
        assert taken.table["name"].to_pylist() == [b"%06d" % k for k in places]


def listing(names: list[bytes]) -> Listing:
    labels = pa.array(np.arange(len(names)) % 3, pa.int32())
    columns = table(names).add_column(1, "label", labels)
    rows = mapped(columns.to_batches(max_chunksize=ROWS), columns.schema)
    return Listing(Folder.at("/nowhere"), ("a", "b", "ü"), rows.table, "file", pages=rows.pages)


def test_images_are_taken_in_any_order() -> None:
    names = [b"%04d" % k for k in range(5 * ROWS)]
    whole = listing(names)
    places = np.random.default_rng(0).integers(0, len(names), 100)
    assert whole.take(places).table["name"].to_pylist() == [names[k] for k in places]
    assert whole.slice(60, 70).table["name"].to_pylist() == names[60:70]
    assert len(whole.take(np.arange(2 * ROWS))) == 2 * ROWS


@pytest.mark.parametrize("strange", [b"", b"\xff\xfe.png", "ß/\U0001f408.png".encode(), b"\xed\xa0\x80"])
def test_an_identity_is_that_of_its_definition_image_by_image(strange: bytes) -> None:
    names = [b"%04d" % k for k in range(3 * ROWS)]
    names[70] = strange
    images = listing(names)
    digests = np.random.default_rng(0).integers(0, 256, (len(names), 32), dtype=np.uint8)
    labels = images.table["label"].to_pylist()
    expected = combine_identity(images.classes, names, labels, digests.tobytes())
    assert expected == combine_identity(images.classes, map(as_text, names), labels, digests.tobytes())
    assert listing_identity(images, digests) == expected
    rows = DigestRows(len(names))
    rows.write(0, digests.tobytes())
    assert listing_identity(images, rows.read) == expected


def test_names_that_repeat_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [b"%04d" % k for k in range(3 * ROWS)]
    assert duplicates(listing(names)) == []
    assert duplicates(listing([*names, b"0180", b"0007", b"0180"])) == [b"0007", b"0180"]
    monkeypatch.setattr("builtins.hash", lambda name: len(name))  # every two names collide
    assert duplicates(listing([*names, b"0180"])) == [b"0180"]


def test_digests_are_kept_by_position() -> None:
    number = 3 * ROWS + 5
    digests = np.random.default_rng(0).integers(0, 256, (number, 32), dtype=np.uint8)
    rows = DigestRows(number)
    for first in reversed(range(0, number, 50)):
        rows.write(first, digests[first : first + 50].tobytes())
    assert np.array_equal(np.concatenate([block for _, block in rows.blocks()]), digests)

    def places() -> Iterator[list[int]]:
        yield from ([], [0], [0, 63, 64, 65, number - 1], list(range(number)))

    for chosen in places():
        assert np.array_equal(rows.take(np.array(chosen, np.int64)), digests[chosen])
