"""ImageNet's class names, and labels by name."""

import os
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.sampling.class_names import class_labels, class_names, imagenet_names

KNOWN = {
    0: "tench",
    1: "goldfish",
    88: "macaw",
    207: "golden retriever",
    360: "otter",
    387: "lesser panda",
    417: "balloon",
    974: "geyser",
    979: "valley",
    999: "toilet tissue",
}


def test_a_thousand_names_with_the_well_known_ones_in_place() -> None:
    names = imagenet_names()
    assert len(names) == 1000
    assert {label: names[label][0] for label in KNOWN} == KNOWN
    assert all(name == name.strip() and name for known in names for name in known)


def test_only_the_three_names_that_ilsvrc_has_twice_are_there_twice() -> None:
    every = [name.casefold() for known in imagenet_names() for name in known]
    assert {name for name in every if every.count(name) > 1} == {"crane", "maillot", "cardigan"}


def test_names_stand_in_the_order_of_sorted_wordnet_ids(photos: Path) -> None:
    """The photos' names (<wnid>/<wnid>_<name>.JPEG), in the order of their ids, are found at indices that only rise."""

    def plain(name: str) -> str:
        return "".join(letter for letter in name.casefold() if letter.isalnum())

    names = [set(map(plain, known)) for known in imagenet_names()]
    last = -1
    for folder in sorted(photos.iterdir()):
        wanted = plain(os.listdir(folder)[0].partition("_")[2].rpartition(".")[0])
        last = next(label for label in range(last + 1, 1000) if wanted in names[label])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("207", 207),
        ("Golden Retriever", 207),
        ("golden r", 207),
        ("otter", 360),  # a whole name goes before otterhound, which only begins so
        ("red panda", 387),
        (" tench ", 0),
    ],
)
def test_a_class_by_index_name_or_beginning(text: str, label: int) -> None:
    assert class_labels([text], imagenet_names()) == [label]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crane", r"class 'crane' may be 134 \(crane\) or 517 \(crane\); use the index"),
        ("maillot", r"may be 638 \(maillot\) or 639 \(maillot, tank suit\)"),
        ("miniature", r"may be 196 \(miniature schnauzer\) or 237 .* or 266 "),
        ("goldfsh", r"no class is called 'goldfsh'; did you mean 1 \(goldfish\)"),
        ("retriever", r"did you mean .*207 \(golden retriever\)"),
        ("qqqq", r"no class is called 'qqqq'; the model has 1000 classes, such as 0 \(tench\)"),
        ("", "no class is called ''"),
        ("1000", r"class 1000 does not exist; the model has 0\.\.999"),
        ("-1", r"class -1 does not exist; the model has 0\.\.999"),
    ],
)
def test_what_names_no_class_or_several(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        class_labels(["0", text], imagenet_names())


def test_a_models_own_names_come_first() -> None:
    assert class_names(["cat", "dog"], 2) == (("cat",), ("dog",))
    assert class_names([], 2) == (("0",), ("1",))
    assert class_names([], 1000) == imagenet_names()
    wnids = [f"n{number:08d}" for number in range(1000)]
    assert class_names(wnids, 1000)[207] == ("golden retriever", "n00000207")
    assert class_names([f"c{number}" for number in range(1000)], 1000)[0] == ("c0",)
    assert class_labels(["n00000207", "otter"], class_names(wnids, 1000)) == [207, 360]


def test_names_that_are_numbers_are_names() -> None:
    names = class_names(["0", "1", "10", "2"], 4)
    assert class_labels(["2", "10", "3"], names) == [3, 2, 3]
    with pytest.raises(UserError, match="the list of classes is empty"):
        class_labels([], names)
