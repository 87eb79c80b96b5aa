"""What changed between two sets of images: against a count by hand, and on cases with names."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from edt_core.data.sources.delta import UNLABELLED, Delta, LabelledImages, delta


def images(*rows: tuple[str, str | None], classes: tuple[str, ...] | None = None) -> LabelledImages:
    """Images by (content, class); a class of None is that of an unreadable image."""
    names = classes if classes is not None else tuple(sorted({name for _, name in rows if name is not None}))
    digests = b"".join(hashlib.sha256(content.encode()).digest() for content, _ in rows)
    labels = [UNLABELLED if name is None else names.index(name) for _, name in rows]
    return LabelledImages(names, np.frombuffer(digests, np.uint8).reshape(-1, 32), np.array(labels, np.int64))


BASE = images(("1", "ant"), ("2", "ant"), ("3", "bee"), ("4", "bee"), ("5", "cat"), ("6", "cat"))


def test_nothing_changed() -> None:
    found = delta(BASE, BASE)
    assert found == Delta(6)
    assert not found


def test_added_removed_and_moved() -> None:
    new = images(("1", "ant"), ("3", "bee"), ("4", "ant"), ("5", "cat"), ("6", "cat"), ("7", "bee"), ("8", "bee"))
    found = delta(BASE, new)
    assert found == Delta(4, {"bee": 2}, {"ant": 1}, {("bee", "ant"): 1})
    assert (found.num_added, found.num_removed, found.num_moved) == (2, 1, 1)


def test_a_renamed_class_is_neither_moved_nor_new() -> None:
    new = images(("1", "ape"), ("2", "ape"), ("9", "ape"), ("3", "bee"), ("4", "ape"), ("5", "cat"), ("6", "cat"))
    assert delta(BASE, new) == Delta(5, {"ape": 1}, {}, {("bee", "ape"): 1}, {"ant": "ape"})


def test_classes_gained_and_lost() -> None:
    new = images(("1", "ant"), ("2", "ant"), ("3", "bee"), ("4", "bee"), ("7", "dog"), ("8", "dog"))
    assert delta(BASE, new) == Delta(4, {"dog": 2}, {"cat": 2}, {}, {}, ("dog",), ("cat",))
    empty = images(("1", "ant"), ("3", "bee"), classes=("ant", "bee", "eel"))
    assert delta(images(("1", "ant"), ("3", "bee")), empty) == Delta(2, gained=("eel",))


def test_a_class_that_is_split_is_not_renamed() -> None:
    base = images(*((str(k), "all") for k in range(9)), ("x", "rest"))
    new = images(*((str(k), f"part{k % 3}") for k in range(9)), ("x", "rest"))
    found = delta(base, new)
    assert found.renamed == {}
    assert found.moved == {("all", f"part{k}"): 3 for k in range(3)}
    assert (found.gained, found.lost) == (("part0", "part1", "part2"), ("all",))


def test_an_image_that_is_there_twice_is_counted_twice() -> None:
    base = images(("1", "ant"), ("1", "ant"), ("1", "bee"))
    new = images(("1", "ant"), ("1", "bee"), ("1", "bee"), ("1", "bee"))
    assert delta(base, new) == Delta(2, {"bee": 1}, {}, {("ant", "bee"): 1})


def test_an_unreadable_image_is_neither_added_nor_removed() -> None:
    base = images(("1", "ant"), ("2", "bee"), ("broken", None), ("gone", None))
    assert delta(base, images(("1", "ant"), ("2", "bee"), ("broken", "bee"))) == Delta(2)


def test_from_nothing_and_to_nothing() -> None:
    nothing = images(classes=())
    assert delta(nothing, BASE).added == {"ant": 2, "bee": 2, "cat": 2}
    assert delta(BASE, nothing).removed == {"ant": 2, "bee": 2, "cat": 2}
    assert not delta(nothing, nothing)


@pytest.mark.parametrize("seed", range(20))
def test_the_counts_are_those_of_multisets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ("ant", "bee", "cat")
    one, other = (
        [(str(rng.integers(12)), names[rng.integers(3)]) for _ in range(rng.integers(1, 30))] for _ in range(2)
    )
    found = delta(images(*one, classes=names), images(*other, classes=names))
    before, after = Counter(one), Counter(other)
    same = before & after
    gone, come = Counter(c for c, _ in (before - same).elements()), Counter(c for c, _ in (after - same).elements())
    assert found.unchanged == same.total()
    assert found.num_moved == (gone & come).total()
    assert found.num_removed == (gone - come).total()
    assert found.num_added == (come - gone).total()
    by_class = Counter(name for _, name in other)
    for name in names:
        was = sum(label == name for _, label in one)
        moved_in = sum(n for (_, to), n in found.moved.items() if to == name)
        moved_out = sum(n for (source, _), n in found.moved.items() if source == name)
        assert was + found.added.get(name, 0) - found.removed.get(name, 0) + moved_in - moved_out == by_class[name]
