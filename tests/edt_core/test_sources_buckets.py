"""A bucket listed page by page, its folders side by side: every object once, whatever the shape of the folders."""

import threading
from typing import Any

import pytest

from edt_core.data.sources.walk import files_below, store
from edt_core.progress import Silent
from edt_core.store.folder import Folder

SHAPES: dict[str, list[str]] = {
    "classes": [f"{label}/{k}.png" for label in "abc" for k in range(7)],
    "one folder around the classes": [f"train/{label}/{k}.png" for label in ("ant", "bee", "cat") for k in range(9)],
    "one flat folder": [f"images/{k:03d}.png" for k in range(40)],
    "folders in folders": [f"a/{k // 9}/{k // 3}/{k}.png" for k in range(60)],
    "files beside folders": [
        *(f"a/{k:02d}.png" for k in range(0, 40, 2)),
        *(f"a/{k:02d}/{i}.png" for k in range(1, 30, 7) for i in range(9)),
        *(f"a/{k:02d}-x/{i}.png" for k in range(1, 30, 7) for i in range(2)),
    ],
    "directly in the bucket": [*(f"{k}.png" for k in range(12)), "a/1.png"],
    "dotfiles and strange names": ["a/.x/1.png", "a/.hidden", *(f"a/ü {k}+&%.png" for k in range(9)), "b/\U0001f408/1"],
}


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PAGE", 3)
    monkeypatch.setattr(store, "_PAGES", 2)


def put(root: str, names: list[str]) -> Any:
    import fsspec

    files = fsspec.filesystem("s3")
    files.pipe({f"{root}/{name}": name.encode() for name in names})
    return files


def listed(root: str) -> dict[bytes, tuple[int, str]]:
    table = files_below(Folder.at(root), lambda name: True, Silent()).table
    names = table["name"].to_pylist()
    assert names == sorted(names)
    assert len(names) == len(set(names))
    return dict(zip(names, zip(table["size"].to_pylist(), table["version"].to_pylist(), strict=True), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_object_is_listed_once(shape: str, s3: str, small_pages: None) -> None:
    root = f"{s3}/source"
    files = put(root, SHAPES[shape])
    infos = files.find(root, detail=True).values()
    expected = {
        info["name"].removeprefix(f"{root.removeprefix('s3://')}/").encode(): (info["size"], info["ETag"].strip('"'))
        for info in infos
    }
    visible = {name: value for name, value in expected.items() if b"/." not in name}
    assert listed(root) == visible
    assert len(visible) >= len(SHAPES[shape]) - 2


def test_a_large_folder_is_listed_in_several_threads(
    s3: str, small_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{s3}/source"
    files = put(root, SHAPES["one folder around the classes"])
    prefixes: dict[str, set[int]] = {}
    plain = type(files).call_s3

    def call(self: Any, method: str, **request: Any) -> Any:
        prefixes.setdefault(request["Prefix"], set()).add(threading.get_ident())
        assert request["MaxKeys"] == 3
        return plain(self, method, **request)

    monkeypatch.setattr(type(files), "call_s3", call)
    assert len(listed(root)) == 27
    assert set(prefixes) >= {f"source/train/{label}/" for label in ("bee", "cat")}, "each class is a part of its own"


def test_a_store_that_answers_in_no_order_loses_nothing(
    s3: str, small_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As directory buckets do: where an answer ends says nothing of what is missing."""
    root = f"{s3}/source"
    files = put(root, SHAPES["folders in folders"])
    plain = type(files).call_s3

    def call(self: Any, method: str, **request: Any) -> Any:
        answer = plain(self, method, **request)
        contents = sorted(answer.get("Contents", []), key=lambda item: item["Key"], reverse=True)
        return {**answer, "Contents": contents}

    monkeypatch.setattr(type(files), "call_s3", call)
    assert len(listed(root)) == 60
