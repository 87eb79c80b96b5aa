"""The difference of two sets of labelled images."""

import hashlib
import json
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edt_core.data.sources.delta import ImageDelta, LabelledDigests, image_delta

CLASSES = ("cat", "dog", "fox", "owl")
Images = list[tuple[int, str]]  # number of the image, class


def labelled(images: Images, classes: tuple[str, ...] = CLASSES) -> LabelledDigests:
    digests = [hashlib.sha256(b"%d" % number).digest() for number, _ in images]
    labels = [classes.index(name) for _, name in images]
    return LabelledDigests(
        np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32), np.array(labels, np.int64), classes
    )


images = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(CLASSES)), max_size=40)


@given(images, images)
def test_every_image_is_counted_once(before: Images, now: Images) -> None:
    delta = image_delta(labelled(before), labelled(now))
    moved = sum(delta.moved.values())
    assert delta.unchanged == (Counter(before) & Counter(now)).total()
    assert delta.unchanged + moved + sum(delta.removed.values()) == len(before) == delta.before
    assert delta.unchanged + moved + sum(delta.added.values()) == len(now) == delta.now
    # What is removed or added is so whatever its class: moves explain as much as they can.
    old, new = (Counter(number for number, _ in side) for side in (before, now))
    assert sum(delta.removed.values()) == (old - new).total()
    assert sum(delta.added.values()) == (new - old).total()


@given(images, st.randoms(use_true_random=False))
def test_order_does_not_matter(before: Images, random: object) -> None:
    shuffled = list(before)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert not image_delta(labelled(before), labelled(shuffled))


@given(images, images)
def test_backwards_it_is_the_reverse(before: Images, now: Images) -> None:
    there, back = image_delta(labelled(before), labelled(now)), image_delta(labelled(now), labelled(before))
    assert (there.added, there.removed, there.unchanged) == (back.removed, back.added, back.unchanged)
    assert {(b, a): number for (a, b), number in there.moved.items()} == dict(back.moved)


def test_each_kind_of_change() -> None:
    before = labelled([(1, "cat"), (2, "cat"), (3, "dog"), (4, "fox"), (5, "fox")], ("cat", "dog", "fox"))
    now = labelled([(1, "cat"), (3, "cat"), (4, "vulpes"), (5, "vulpes"), (6, "owl")], ("cat", "dog", "owl", "vulpes"))
    delta = image_delta(before, now)
    assert delta == ImageDelta(
        before=5,
        now=5,
        unchanged=1,
        added={"owl": 1},
        removed={"cat": 1},
        moved={("dog", "cat"): 1},
        renamed={"fox": "vulpes"},
        gained=("owl",),
    )
    assert str(delta) == ("+1 -1 images: owl +1, cat -1; moved dog -> cat 1; renamed fox -> vulpes; new classes owl")
    assert json.loads(json.dumps(delta.to_dict()))["moved"] == [{"from": "dog", "to": "cat", "images": 1}]


def test_a_class_that_is_split_or_merged_was_not_renamed() -> None:
    before = labelled([(1, "cat"), (2, "cat"), (3, "dog")], ("cat", "dog"))
    split = image_delta(before, labelled([(1, "a"), (2, "b"), (3, "dog")], ("a", "b", "dog")))
    assert (split.renamed, split.gained, split.lost) == ({}, ("a", "b"), ("cat",))
    merged = image_delta(before, labelled([(1, "a"), (2, "a"), (3, "a")], ("a",)))
    assert (merged.renamed, merged.moved) == ({}, {("cat", "a"): 2, ("dog", "a"): 1})


def test_the_same_images_have_no_difference() -> None:
    same = labelled([(1, "cat"), (1, "cat"), (2, "dog")])
    assert not image_delta(same, same)
    assert str(image_delta(same, same)) == "no image changed"


def test_nothing_before() -> None:
    delta = image_delta(labelled([]), labelled([(1, "cat"), (1, "dog")]))
    assert (delta.added, delta.unchanged) == ({"cat": 1, "dog": 1}, 0)
