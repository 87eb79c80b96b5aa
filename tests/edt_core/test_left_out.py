"""What of a source was not used: a line each kind, with numbers."""

from pathlib import Path

from PIL import Image

from edt_core.config import SourceConfig
from edt_core.data.left_out import left_out
from edt_core.data.sources import list_source


def test_each_kind_has_a_line_with_its_number_and_examples() -> None:
    counts = {
        "found": 1200,
        "quarantined": 4,
        "quarantined_images": [{"path": f"a/{n}.png", "reason": "truncated"} for n in range(4)],
        "left_out": {".txt": 12, ".md": 1},
        "skipped": {"directly in the source, without a class folder": 3},
        "class_counts": [600, 0, 596, 0],
    }
    assert left_out(counts, ["ant", "bee", "cat", "dog"]) == [
        "13 files that are not images: 12 .txt, 1 .md",
        "3 images directly in the source, without a class folder",
        "4 of 1,200 images that could not be read: a/0.png (truncated), a/1.png (truncated), a/2.png (truncated) and 1 "
        "more",
        "2 of 4 classes, which have no images: bee, dog",
    ]


def test_nothing_is_said_where_all_is_used_and_of_manifests_before() -> None:
    counts = {"found": 2, "quarantined": 0, "quarantined_images": [], "left_out": {}, "class_counts": [1, 1]}
    assert left_out(counts, ["a", "b"]) == []
    assert left_out({"images": 2}, ["a", "b"]) == []


def test_images_without_a_class_are_counted_by_their_reason(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", "loose.png", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("") if name.endswith("txt") else Image.new("RGB", (8, 8)).save(tmp_path / name)
    listing = list_source(SourceConfig(kind="image_folder", path=str(tmp_path)))
    assert listing.skipped == {"directly in the source, without a class folder": 1}
    assert listing.left_out == {".txt": 1}
    assert listing.slice(0, 1).skipped == {}
    (tmp_path / "labels.csv").write_text("file,label\na/1.png,x\nb/2.png,y\n")
    listing = list_source(SourceConfig(kind="labels", path=str(tmp_path)))
    assert listing.skipped == {"that labels.csv does not list": 1}
