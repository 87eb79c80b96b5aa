"""What becomes a class and what an image: one rule for all layouts, and data sets whose folders are not classes."""

import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from edt_core.config import SourceConfig
from edt_core.data.images import decode_rgb, image_extensions, image_formats
from edt_core.data.sources import Listing, list_source, remarks, source_identity
from edt_core.errors import UserError
from edt_core.progress import CollectedWarnings, Silent
from tests.support.sources import tar_bytes


def listed(path: Path, told: CollectedWarnings | None = None, **options: Any) -> Listing:
    """The listing of a source, and what is remarked of it."""
    listing = list_source(SourceConfig(path=str(path), **options), told or Silent())
    if told is not None:
        told.warnings += remarks(listing)
    return listing


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 40).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def labels_by_class(listing: Listing) -> dict[str, str]:
    """Class name by the name of an image without folder and extension."""
    labels = listing.table["label"].to_pylist()
    return {
        Path(image.name).name.split(".")[0]: listing.classes[label]
        for image, label in zip(listing.images(), labels, strict=True)
    }


def test_everything_that_pillow_decodes_is_an_image(tmp_path: Path) -> None:
    """A class in a format that few programs write is a class: left out it would shift the others."""
    kinds = {"ant": ("PNG", ".PNG"), "bee": ("JPEG", ".jfif"), "cat": ("TIFF", ".tif"), "dog": ("JPEG2000", ".jp2")}
    if "AVIF" in image_formats():
        kinds["auk"] = ("AVIF", ".avif")
    for name, (kind, extension) in kinds.items():
        (tmp_path / name).mkdir()
        for k in range(2):
            (tmp_path / name / f"{k}{extension}").write_bytes(encoded(kind))
    listing = listed(tmp_path)
    assert listing.classes == tuple(sorted(kinds))
    assert listing.class_counts.tolist() == [2] * len(kinds)
    assert all(image.data and decode_rgb(image.data).size == (16, 16) for image in listing.images())


def test_the_extensions_are_those_of_the_installed_pillow() -> None:
    known = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    assert image_extensions() <= known
    left = {Image.registered_extensions()[extension] for extension in known - image_extensions()}
    assert left == {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # told but not decoded; a program for Ghostscript


def test_a_plugin_for_another_format_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: Image.register_extension("PNG", ".heic")  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
        patched.setitem(sys.modules, "pillow_heif", plugin)
        image_formats.cache_clear()
        image_extensions.cache_clear()
        assert ".heic" in image_extensions()
    image_formats.cache_clear()
    image_extensions.cache_clear()


def test_postscript_is_never_run() -> None:
    with pytest.raises(OSError, match="not an image in a format"):
        decode_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")


def test_what_is_left_out_is_counted_by_extension(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/1.txt", "a/2.txt", "b/1.png", "b/list", "b/x.unknown", "notes.TXT")
    write(tmp_path, "a/.hidden/1.png", "__MACOSX/a/1.png", "a/@eaDir/1.png/THUMB.jpg")
    told = CollectedWarnings()
    listing = listed(tmp_path, told)
    assert listing.left_out == {".txt": 3, "": 1, ".unknown": 1}
    assert len(listing) == 2
    assert "5 other files in" in told.warnings[0]
    assert "3 .txt, 1 without extension, 1 .unknown" in told.warnings[0]


def test_what_archives_hold_besides_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "s", "README")
    members = [("a.png", b"x"), ("a.cls", b"0"), ("a.txt", b"x"), ("b.png", b"y"), ("b.cls", b"1"), ("b.seg.png", b"y")]
    (tmp_path / "s" / "s.tar").write_bytes(tar_bytes(members))
    assert listed(tmp_path / "s").left_out == {"": 1, ".txt": 1, ".seg.png": 1}
    (tmp_path / "t").mkdir()
    for k in (1, 2):
        content = tar_bytes([(f"n0000000{k}_1.JPEG", b"x"), ("list.txt", b"x")])
        (tmp_path / "t" / f"n0000000{k}.tar").write_bytes(content)
    assert listed(tmp_path / "t").left_out == {".txt": 2}


def test_a_class_folder_without_an_image_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "ant/1.png", "bee/1.heix", "bee/2.heix", "cat/1.png", "dog/1.png")
    (tmp_path / "eel").mkdir()
    with pytest.raises(
        UserError, match=r"2 of the class folders .* no image: 'bee' \(2 .heix\), 'eel' \(no file\).*allow-emp"
    ):
        listed(tmp_path)
    assert listed(tmp_path, classes=("ant", "cat")).classes == ("ant", "cat")
    with pytest.raises(UserError, match=r"1 of the class folders .*'bee'"):
        listed(tmp_path, classes=("ant", "bee"))


def test_empty_classes_keep_their_place_where_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "ant/1.png", "bee/1.txt", "cat/1.png")
    told = CollectedWarnings()
    listing = listed(tmp_path, told, allow_empty_classes=True)
    assert listing.classes == ("ant", "bee", "cat")
    assert listing.class_counts.tolist() == [1, 0, 1]
    assert any("1 of 3 classes have no images: 'bee'" in message for message in told.warnings)


def write_numbered(root: Path, layout: str, labels: list[int]) -> Path:
    """Images with these whole numbers as labels, in a layout."""
    root.mkdir()
    if layout == "folder":
        for k, label in enumerate(labels):
            write(root, f"{label}/i{k}.png")
    elif layout == "webdataset":
        members = [(f"i{k}.{end}", b"%d" % label) for k, label in enumerate(labels) for end in ("png", "cls")]
        (root / "s.tar").write_bytes(tar_bytes(members))
    elif layout == "parquet":
        table = pa.table({"image": [b"%d" % k for k in range(len(labels))], "label": labels})
        pq.write_table(table, root / "x.parquet")
    else:
        write(root, *(f"i{k}.png" for k in range(len(labels))))
        pairs = {f"i{k}.png": label for k, label in enumerate(labels)}
        text = {
            "labels.csv": "file,label\n" + "".join(f"{file},{label}\n" for file, label in pairs.items()),
            "labels.json": json.dumps(pairs),
            "labels.tsv": "".join(f"{file}\t{label}\n" for file, label in reversed(pairs.items())),
            "labels.txt": "".join(f"/{file} {label}\n" for file, label in pairs.items()),
        }
        (root / layout).write_text(text[layout])
    return root


LAYOUTS = ["folder", "webdataset", "parquet", "labels.csv", "labels.json", "labels.tsv", "labels.txt"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", [range(12), (1, 2, 3), (3, 700), (1, 2, 10)], ids=str)
def test_numbers_that_occur_are_the_classes_in_every_layout(layout: str, numbers: Any, tmp_path: Path) -> None:
    """Numbered in order of their value, named by themselves, none without images."""
    labels = [*numbers, *reversed(numbers)]
    told = CollectedWarnings()
    options = {"labels": layout} if layout.endswith(("tsv", "txt")) else {}
    listing = listed(write_numbered(tmp_path / "source", layout, labels), told, **options)
    assert listing.classes == tuple(map(str, numbers))
    assert listing.class_counts.tolist() == [2] * len(numbers)
    assert sorted(listing.table["label"].to_pylist()) == sorted([*range(len(numbers))] * 2)
    if layout != "parquet":
        assert labels_by_class(listing) == {f"i{k}": str(label) for k, label in enumerate(labels)}
    differs = any("named by numbers that are not their indices" in message for message in told.warnings)
    assert differs == (list(numbers) != list(range(len(numbers))))


def test_names_that_come_with_the_labels_keep_their_places(tmp_path: Path) -> None:
    folder = write_numbered(tmp_path / "source", "webdataset", [0, 2, 2])
    (folder / "classes.json").write_text('["cat", "dog", "emu"]')
    told = CollectedWarnings()
    listing = listed(folder, told)
    assert listing.classes == ("cat", "dog", "emu")
    assert listing.class_counts.tolist() == [1, 0, 2]
    assert "1 of 3 classes have no images: 'dog'" in told.warnings[0]
    assert listing.left_out == {}


def test_a_limit_below_the_number_of_classes_is_told(tmp_path: Path) -> None:
    write(tmp_path, *(f"c{k}/{i}.png" for k in range(4) for i in range(4)))
    told = CollectedWarnings()
    listing = listed(tmp_path, told, limit=3)
    assert listing.classes == ("c0", "c1", "c2", "c3")
    assert "1 of 4 classes have no images: 'c3'" in told.warnings[0]


def test_numbers_with_leading_zeros_are_names_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "010/a.png", "2/b.png", "01/c.png")
    assert listed(tmp_path).classes == ("01", "2", "010")
    write(tmp_path / "flat", *(f"{name}.png" for name in "abc"))
    (tmp_path / "flat" / "labels.csv").write_text("a.png,010\nb.png,2\nc.png,01\n")
    assert listed(tmp_path / "flat").classes == ("01", "2", "010")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # ImageNet as Kaggle has it, CLS-LOC of ILSVRC: classes under train alone
        (["train/n01/1.png", "train/n02/1.png", "val/1.png", "test/1.png"], "are splits .*give .*/train"),
        # tiny-imagenet
        (
            ["train/n01/images/1.png", "train/n02/images/1.png", "val/images/1.png", "test/images/1.png"],
            "splits.*/train",
        ),
        # COCO
        (["train2017/1.png", "val2017/1.png", "test2017/1.png", "labels/x/1.png"], "parts .*labels.csv"),
        # Oxford-IIIT pets
        (["images/cat_1.png", "annotations/trimaps/cat_1.png"], "parts .*labels.csv"),
        # Oxford flowers, with the segmentations
        (["jpg/image_1.png", "segmim/image_1.png"], "parts .*labels.csv"),
        # Pascal VOC
        (["JPEGImages/1.png", "SegmentationClass/1.png", "SegmentationObject/1.png"], "parts .*labels.csv"),
        # CUB, Food-101
        (["images/001.a/1.png", "images/002.b/1.png"], "of a data set, not classes; give .*/images"),
        # Caltech
        (["101_ObjectCategories/ant/1.png", "101_ObjectCategories/bee/1.png"], "all images .*give .*/101_Obj"),
        # Places, as its archive is; iNaturalist 2017
        (["a/abbey/1.png", "a/alley/1.png", "b/bar/1.png", "b/bay/1.png"], "2 folders .* contain 4 .*class-folder"),
        # Places, small images, with its splits beside each other
        (["data_256/a/abbey/1.png", "data_256/b/bay/1.png"], "all images .*give .*/data_256"),
        (["val_256/1.png", "test_256/1.png"], "splits .*labels.csv"),
        # splits beside something else
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png", "docs/logo.png"], "'val'.* splits .*/train"),
        # Dogs vs. Cats as Kaggle has it, Intel's scenes
        (["train/cat.0.png", "train/dog.0.png", "test1/1.png"], "splits .*labels.csv"),
        (["seg_train/seg_train/a/1.png", "seg_pred/seg_pred/1.png"], "splits .*labels.csv"),
        # ImageNet as Kaggle has it, the folder above all
        (["ILSVRC/Data/CLS-LOC/train/n01/1.png", "ILSVRC/Data/CLS-LOC/val/1.png"], "give .*/ILSVRC/Data/CLS-LOC"),
    ],
)
def test_folders_of_well_known_data_sets_that_are_no_classes(names: list[str], message: str, tmp_path: Path) -> None:
    write(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        listed(tmp_path)


def test_folders_that_look_like_splits_are_classes_where_they_are_named(tmp_path: Path) -> None:
    write(tmp_path, "train/1.png", "test/1.png")
    with pytest.raises(UserError, match="splits"):
        listed(tmp_path)
    assert listed(tmp_path, classes=("train", "test")).classes == ("test", "train")


def test_two_levels_of_folders(tmp_path: Path) -> None:
    write(tmp_path, "a/hall/1.png", "a/bar/in/1.png", "b/hall/1.png", "b/bay/1.png")
    assert listed(tmp_path, class_folder="first").classes == ("a", "b")
    assert listed(tmp_path, class_folder="last").classes == ("a/bar/in", "a/hall", "b/bay", "b/hall")
    assert listed(tmp_path, classes=("a", "b")).classes == ("a", "b")
    write(tmp_path, "b/2.png")
    assert listed(tmp_path).classes == ("a", "b")  # an image directly in a class folder says which are the classes


def test_one_folder_around_all_is_no_fault_where_the_last_folder_is_the_class(tmp_path: Path) -> None:
    write(tmp_path, "data/ant/1.png", "data/bee/1.png")
    assert listed(tmp_path, class_folder="last").classes == ("data/ant", "data/bee")


def test_an_inner_class_folder_without_an_image_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "g/a/1.png", "g/c/1.heix", "g/list.txt", "h/b/1.png")
    with pytest.raises(UserError, match=r"1 of the class folders .* no image: 'g/c' \(1 .heix\)"):
        listed(tmp_path, class_folder="last")
    assert listed(tmp_path, class_folder="last", allow_empty_classes=True).classes == ("g/a", "g/c", "h/b")


@pytest.mark.parametrize("place", ["", "ant/"])
@pytest.mark.parametrize("name", ["more.tar", "table.parquet"])
def test_archives_beside_images_need_a_choice(place: str, name: str, tmp_path: Path) -> None:
    write(tmp_path, "ant/1.png", "bee/1.png", f"{place}{name}")
    with pytest.raises(UserError, match=r"contains both .* and image files .*source.kind"):
        listed(tmp_path)
    listing = listed(tmp_path, kind="image_folder")
    assert (listing.classes, listing.left_out) == (("ant", "bee"), {f".{name.split('.')[1]}": 1})


def test_declared_names_that_occur_twice_keep_their_places(tmp_path: Path) -> None:
    """ImageNet has two classes `crane`."""
    folder = write_numbered(tmp_path / "source", "webdataset", [0, 1, 2])
    (folder / "classes.json").write_text('["crane", "dog", "crane"]')
    told = CollectedWarnings()
    listing = listed(folder, told)
    assert listing.classes == ("crane", "dog", "crane")
    assert listing.class_counts.tolist() == [1, 1, 1]
    assert "1 names in" in told.warnings[0]


def test_labels_of_parquet_beyond_all_numbers_are_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": [b"a", b"b"], "label": pa.array([0, 1 << 63], pa.uint64())}), tmp_path / "x.parquet"
    )
    with pytest.raises(UserError, match="cannot be class indices"):
        listed(tmp_path)


def test_a_name_that_occurs_twice_in_a_json_object_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.json").write_text('{"a.png": "x", "a.png": "y", "b.png": "x"}')
    with pytest.raises(UserError, match=r"names 'a.png' twice, with 'x' and 'y'"):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data_batch_1", "test_batch", "batches.meta"], "2 of the files are batches of CIFAR.*Parquet"),
        (["train_X.bin", "train_y.bin", "class_names.txt"], "binary files like those of STL-10"),
        (["train-images-idx3-ubyte", "train-labels-idx1-ubyte"], "IDX files like those of MNIST"),
        (["imagenet.beton"], "records of another loader"),
        (["images.zip"], "archives that are not tar"),
    ],
)
def test_images_packed_in_other_ways_are_refused_with_what_to_do(
    names: list[str], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "flat", *names)
    with pytest.raises(UserError, match=message):
        listed(tmp_path / "flat")


def test_annotations_of_objects_are_no_labels(tmp_path: Path) -> None:
    write(tmp_path, "1.png")
    (tmp_path / "instances.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match="annotations of objects, like COCO"):
        listed(tmp_path, labels="instances.json")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("a.png,1.0\nb.png,2.0\n", "2 labels with a decimal point .*'1.0', '2.0'.*astype"),
        ("a.png,cat\nb.png,nan\n", "1 labels with a decimal point or without a value .'nan'"),
        ("a.png,-1\nb.png,cat\n", "1 labels below 0 .'-1'"),
        ("a.png,cat\na.png,dog\nb.png,dog\n", "two different labels to 1 files: 'a.png'"),
        ('a.png,"caf\u00e9"\nb.png,"cafe\u0301"\n', "mean the same: .*u0301.* and .*e9"),
        ("file,class,label\na.png,cat,0\nb.png,dog,1\n", "the columns label and class, but only one"),
        ("a.png,ice  cream\nb.png,ice cream\n", "mean the same"),
        ("a.png,01\nb.png,1\n", "mean the same"),
    ],
)
def test_labels_that_would_make_other_classes_are_refused(labels: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.csv").write_text(labels)
    with pytest.raises(UserError, match=message):
        listed(tmp_path)


def test_labels_in_another_encoding_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.csv").write_bytes("a.png,cat\nb.png,dog\n".encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16; convert it to UTF-8"):
        listed(tmp_path)


def test_classes_that_differ_in_case_are_told(tmp_path: Path) -> None:
    write(tmp_path, "Cat/1.png", "cat/1.png", "dog/1.png")
    told = CollectedWarnings()
    assert listed(tmp_path, told).classes == ("Cat", "cat", "dog")
    assert "only in upper and lower case: 'Cat' and 'cat'" in told.warnings[0]


def test_a_labels_file_in_another_order_is_the_same_source(tmp_path: Path) -> None:
    lines = [f"{k}.png,{k % 3}\n" for k in range(6)]
    identities = set()
    for folder, order in (("one", lines), ("two", lines[::-1])):
        write(tmp_path / folder, *(f"{k}.png" for k in range(6)))
        (tmp_path / folder / "labels.csv").write_text("file,label\n" + "".join(order))
        identities.add(source_identity(listed(tmp_path / folder)))
    assert len(identities) == 1
