"""Labels files: every form that is read, and everything that is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import SourceConfig
from edt_core.data.sources import Listing, list_source, source_identity
from edt_core.errors import UserError
from edt_core.progress import Silent


class Told(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png", "sub/3.jfif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def listed(folder: Path, **options: Any) -> Listing:
    return list_source(SourceConfig(path=str(folder), **options))


def pairs(listing: Listing) -> list[tuple[str, str]]:
    return [(image.name, listing.classes[image.label]) for image in listing.images() if image.data]


GIVEN = {"2.png": "cat", "1.png": "dog", "sub/3.jfif": "cat"}
EXPECTED = [("1.png", "dog"), ("2.png", "cat"), ("sub/3.jfif", "cat")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "file_name,label\n" + "".join(f"{file},{label}\n" for file, label in GIVEN.items())),
        ("labels.csv", "\ufeffid,Class,Path\r\n" + "".join(f"7,{label},./{file}\r\n" for file, label in GIVEN.items())),
        ("labels.csv", "".join(f"{file}, {label} \n" for file, label in GIVEN.items()) + "1.png,dog\n"),
        ("labels.json", json.dumps(GIVEN)),
        ("labels.json", json.dumps(list(GIVEN.items()))),
        ("labels.json", json.dumps([{"file_name": file, "label": label} for file, label in GIVEN.items()])),
        ("dataset.json", json.dumps({"labels": list(GIVEN.items())})),
        ("metadata.jsonl", "\n".join(json.dumps({"image": file, "category": c}) for file, c in GIVEN.items())),
    ],
)
def test_forms_of_labels(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    listing = listed(folder)
    assert listing.classes == ("cat", "dog")
    assert pairs(listing) == EXPECTED


def test_a_labels_file_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("elsewhere") / "mine.json"
    path.write_text(json.dumps({f"{folder}/{name}": label for name, label in GIVEN.items()}))
    assert pairs(listed(folder, labels=str(path))) == EXPECTED
    assert pairs(listed(folder, labels=f"file://{path}")) == EXPECTED
    with pytest.raises(UserError, match=r"other\.csv does not exist.*source\.labels"):
        listed(folder, labels="other.csv")


@pytest.mark.parametrize(
    ("labels", "classes"), [((0, 1, 2), "0 1 2"), ((10, 9, 10), "9 10"), (("2", "10", "2"), "2 10")]
)
def test_whole_numbers_keep_their_order(folder: Path, labels: tuple[Any, ...], classes: str) -> None:
    (folder / "labels.json").write_text(json.dumps(dict(zip(sorted(GIVEN), labels, strict=True))))
    listing = listed(folder)
    assert listing.classes == tuple(classes.split())
    assert [label for _, label in pairs(listing)] == [str(label) for label in labels]


def test_labels_that_are_not_utf8(folder: Path) -> None:
    (folder / "labels.csv").write_bytes(b"1.png,h\xe4h\n2.png,dog\nsub/3.jfif,dog\n")
    listing = listed(folder)
    assert listing.classes == ("dog", "h\\xe4h")
    assert len(source_identity(listing)) == 64
    (folder / "labels.csv").unlink()
    (folder / "labels.json").write_text(json.dumps({"1.png": "\ud800", "2.png": "dog", "\ud800.png": "dog"}))
    with pytest.raises(UserError, match="1 of them are not in"):
        listed(folder)


def test_images_that_are_not_listed_are_told(folder: Path) -> None:
    told = Told()
    (folder / "more.png").write_bytes(b"x")
    (folder / "labels.json").write_text(json.dumps(GIVEN))
    assert len(list_source(SourceConfig(path=str(folder)), told)) == 3
    assert "1 images in" in told.warnings[0]
    assert "'more.png'" in told.warnings[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.csv", "", "is empty"),
        ("labels.csv", "file_name,label\n", "is empty"),
        ("labels.csv", "file_name,text\n1.png,x\n", "has the columns file_name, text; it needs one of"),
        ("labels.csv", "1.png\n2.png\n", "row 1 has 1 columns"),
        ("labels.csv", "file_name,label\n1.png,\n", "'1.png' has no label"),
        ("labels.csv", "1.png,a\n2.png,b\n9.png,b\n../1.png,a\n", "lists 4 files, and 2 of them .*'9.png', '../1.png'"),
        ("labels.csv", "1.png,a\n2.png,b\n1.png,b\n", "two different labels to 1 files: '1.png'"),
        ("labels.json", "{", "labels.json is not JSON"),
        ("labels.json", '{"labels": null}', "two|whole number|no labels|label None"),
        ("labels.json", '{"1.png": [0, 1]}', r"'1.png' has the label \[0, 1\]"),
        ("labels.json", '{"1.png": 0, "2.png": -1}', "1 labels below 0"),
        ("labels.json", "[1, 2]", "no labels in a supported form"),
        ("metadata.jsonl", '{"file_name": "1.png", "label": 1}\n{"x"\n', "line 2 is not JSON"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": 1}\n', "has the columns file_name, text"),
    ],
)
def test_labels_that_are_refused(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        listed(folder)
