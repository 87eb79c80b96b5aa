"""The report: self-contained, escaped, deterministic, and whole where parts are missing."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from edt_core.evaluation.worth import ACCURACY, Measured, Remark
from edt_core.sampling.grid import sample_grid
from pipelines.report.lineage import lineage_graph
from pipelines.report.page import NOTHING, brief, compare_metrics, duration, render_report, scaled, shown
from tests.support.reports import (
    CLASSES,
    COSTS,
    LINEAGE,
    REGISTRY,
    images,
    neighbourhood,
    report_data,
    row,
    whole_report_data,
)


class Page(HTMLParser):
    """Collects tags, attributes, and open elements that nothing closed."""

    VOID = frozenset({"br", "meta", "link", "img", "source", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def whole() -> str:
    return render_report(whole_report_data())


def test_page_asks_for_nothing_from_outside(whole: str) -> None:
    text, page = whole, Page(whole)
    assert page.open == []
    assert "script" not in page.tags
    addresses = [value or "" for name, value in page.attributes if name in ("src", "srcset", "href")]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_same_data_gives_the_same_bytes(whole: str) -> None:
    assert render_report(whole_report_data()) == whole
    assert sample_grid(images(9), np.arange(9) % 3, CLASSES) == sample_grid(images(9), np.arange(9) % 3, CLASSES)


def test_hostile_text_is_escaped_everywhere() -> None:
    attack = "\"'><script>alert(1)</script>"
    rows = (
        row(attack, attack, "source" + attack),
        replace(row("train", "checkpoint", attack), uri=attack, run_id=attack, code_version=attack),
    )
    champion = REGISTRY.champions[1].model_copy(update={"version": attack, "differences": (attack,)})
    record = {"metric": attack, "run_id": attack, "code_version": attack, "found_with": attack, "lost": attack}
    text = render_report(
        whole_report_data(
            registry=REGISTRY.model_copy(update={**record, "champions": (champion,)}),
            neighbours=replace(neighbourhood(), space=attack, real_labels=np.array([[0, 0, 0], [1, 0, 0]])),
            title=attack,
            config_name=attack,
            decision=attack,
            classes=(attack, "bee", "cat"),
            model={attack: attack},
            protocol={attack: [attack]},
            environment={attack: attack},
            metrics_after={attack: 1.0, "a_" + attack: 2.0},
            lineage=rows,
            config_yaml=attack,
            remarks=(Remark(attack, doubt=True), Remark(attack)),
            left_out=(attack,),
        )
    )
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    page = Page(text)
    assert page.open == []
    assert ("aria-label", f"3 generated images of class {attack}") in page.attributes


def test_the_page_says_what_the_metrics_are_worth_and_what_was_not_used() -> None:
    before, after = {"fd_classifier": 47.5, "accuracy_classifier": 0.1}, {"fd_classifier": 46.7, ACCURACY: 0.119}
    facts = {
        "remarks": (Remark("no better than chance", doubt=True), Remark("a fact")),
        "left_out": ("13 files that are not images: 13 .txt",),
        "metrics_before": before,
        "metrics_after": after,
    }
    text = render_report(whole_report_data(**facts, measured=Measured(after, 400)))
    assert Page(text).open == []
    assert "<li><strong>no better than chance</strong></li>" in text
    assert "<li>a fact</li>" in text
    assert "<li>13 files that are not images: 13 .txt</li>" in text
    assert text.count("may be noise") == 4  # a tile and a row of each metric
    assert 'class="better"' not in text
    clear = render_report(whole_report_data(**facts, measured=Measured({**after, ACCURACY: 0.7}, 400)))
    assert clear.count("may be noise") == 2


def test_page_is_whole_without_optional_parts() -> None:
    nothing = report_data(
        untrained=None,
        untrained_labels=None,
        metrics_before=None,
        metrics_after={},
        protocol={},
        lineage=(),
        environment={},
    )
    text = render_report(nothing)
    assert Page(text).open == []
    assert "No training steps were recorded" in text
    assert "No metrics were computed" in text
    assert "Nearest real images were not computed" in text
    assert 'id="champions"' not in text
    assert 'href="#champions"' not in text
    assert "No run is recorded" in text
    assert "Untrained</th>" not in text
    unmeasured = render_report(report_data(metrics_before={}, untrained=images(0), untrained_labels=np.arange(0)))
    assert "There is no untrained model to compare with." in unmeasured


def test_classifier_metrics_are_said_not_to_be_fid() -> None:
    assert "not FID" in render_report(report_data())
    assert "not FID" not in render_report(report_data(metrics_before={}, metrics_after={"fid": 9.6}))


def test_neighbours_are_told_with_distance_class_and_how_many_were_searched(whole: str) -> None:
    text = " ".join(whole.split())
    assert "feature space of the classifier, to 100 evenly spaced images of the 1,000 real images" in text
    assert "<figcaption>0.625</figcaption>" in text
    assert "<figcaption>1.75<br>cat</figcaption>" in text  # asked for a bee
    every = render_report(report_data(neighbours=replace(neighbourhood(), searched=1000)))
    assert "to all 1,000 real images" in " ".join(every.split())
    why = "The metrics' reference is published statistics."
    assert "reference is published statistics" in render_report(report_data(neighbours=why))


def test_copies_are_counted() -> None:
    found = neighbourhood()
    closest = float(np.percentile(found.real_nearest, 1))
    copied = np.where(np.arange(50) < 20, closest / 2, found.generated_nearest)
    none, many = (
        " ".join(render_report(report_data(neighbours=replace(found, generated_nearest=nearest))).split())
        for nearest in (found.generated_nearest + closest, copied)
    )
    assert "<strong>0</strong> of the generated images (0&nbsp;%)" in none
    assert "<strong>20</strong> of the generated images (40&nbsp;%)" in many


def test_champions_measured_otherwise_are_said_not_to_be_comparable(whole: str) -> None:
    text = " ".join(whole.split())
    first, second = text.partition("version </span>1</th>")[2].split("version </span>2</th>")
    assert "4.5 ± 0.25" in first
    assert "the same" in first
    assert "not comparable</strong>: cfg_scale 1.5 / 1.75" in second
    lost = REGISTRY.model_copy(update={"champions": (), "lost": "2"})
    assert "version 2, was deleted" in render_report(report_data(registry=lost))
    none = REGISTRY.champions[0].model_copy(update={"value": None})
    unmeasured = REGISTRY.model_copy(update={"champions": (none,)})
    assert "fd_classifier of champions" not in render_report(report_data(registry=unmeasured))
    assert "fd_classifier of champions" in text


def test_the_command_is_whole_and_says_which_code(whole: str) -> None:
    text = whole
    assert f"edt reproduce {REGISTRY.run_id} --store /data/edt-store" in re.sub("<[^>]*>", "", text)
    assert "check it out first" in text
    dirty = REGISTRY.model_copy(update={"code_version": "ab" * 20 + "+dirty"})
    assert "not committed" in render_report(report_data(registry=dirty))


def test_steps_are_told_with_throughput_and_cost() -> None:
    section = render_report(report_data(costs=COSTS)).partition('id="costs"')[2]
    cells = re.findall(r"<td class=\"number[^>]*>([^<]*)</td>", section)
    first, train, last, total = cells[:7], cells[7:14], cells[14:21], cells[21:]
    assert first == ["4.0 s", "6&nbsp;%", "1,797 images", "449 images/s", NOTHING, NOTHING, "6.6 MB"]
    assert train == ["1 min 00 s", "93&nbsp;%", "57,600 images", "960 images/s", "3.31 TFLOP", "1 min 58 s", "45 MB"]
    assert last == ["0.5 s", "&lt; 1&nbsp;%", NOTHING, NOTHING, NOTHING, NOTHING, "1.4 kB"]
    assert total == ["1 min 04 s", "3.31 TFLOP", "1 min 58 s", "51.6 MB"]


def test_identifiers_are_whole_in_the_page() -> None:
    text = render_report(report_data())
    for step in LINEAGE:
        assert f'title="{step.fingerprint}">{step.fingerprint}<' in text
        assert f'title="{step.digest}">{step.digest}<' in text


@pytest.mark.parametrize(
    ("name", "before", "after", "change", "verdict"),
    [
        ("fd_classifier", 6.0, 1.5, "÷ 4", "better"),
        ("fid", 1.5, 6.0, "\N{MULTIPLICATION SIGN} 4", "worse"),
        ("precision", 0.25, 0.5, "\N{MULTIPLICATION SIGN} 2", "better"),
        ("recall", 0.5, 0.0, "\N{MINUS SIGN}0.5", "worse"),
        ("kid_classifier", 2.0, -0.5, "\N{MINUS SIGN}2.5", "better"),
        ("accuracy_classifier", 0.5, 0.5, "no change", "same"),
        ("fd_classifier", 26.9, 26.875, "\N{MINUS SIGN}0.025", "better"),  # no factor of 1
        ("recall", 0.5, 0.5001, "+0.0001", "better"),
        ("novel", 1.0, 2.0, "\N{MULTIPLICATION SIGN} 2", ""),
        ("fid", float("nan"), 2.0, "", ""),
    ],
)
def test_change_of_a_metric(name: str, before: float, after: float, change: str, verdict: str) -> None:
    (compared,) = compare_metrics({name: before}, {name: after})
    assert (compared.change, compared.verdict) == (change, verdict)


@pytest.mark.parametrize("down", [False, True])
def test_steps_of_the_diagram_stand_behind_their_inputs(down: bool) -> None:
    graph = lineage_graph(tuple(reversed(LINEAGE)), "model", down)
    # Place and size along the direction come first.
    size = (graph.node_height, graph.node_width) if down else (graph.node_width, graph.node_height)
    place = {node.lines[0]: (node.y, node.x) if down else (node.x, node.y) for node in graph.nodes}
    for step in LINEAGE:
        assert all(place[name][0] + size[0] < place[step.step][0] for name in step.inputs)
    assert max(place, key=lambda name: place[name][0]) == "registry"
    breadth = graph.width if down else graph.height
    for along, across in place.values():
        assert 0 <= across <= breadth - size[1]
        beside = [other for rank, other in place.values() if rank == along and other != across]
        assert all(abs(across - other) > size[1] for other in beside)
    assert len(set(place.values())) == len(LINEAGE) + 2


def test_a_long_name_of_two_words_is_not_cut_in_the_diagram() -> None:
    lines = {node.lines[:2] for node in lineage_graph([row("untrained evaluate", "evaluation")], "model").nodes}
    assert ("untrained", "evaluate") in lines


def test_ambiguous_lineage_is_refused() -> None:
    with pytest.raises(ValueError, match="share a name"):
        lineage_graph((LINEAGE[0], LINEAGE[0]), "model")
    with pytest.raises(ValueError, match="cycle"):
        lineage_graph((row("a", "images", "b"), row("b", "images", "a")), "model")


def test_grid_holds_each_class_in_its_row_enlarged_without_smoothing() -> None:
    pixels, labels = images(7), np.array([0, 1, 2, 0, 1, 2, 0])
    grid = np.asarray(Image.open(io.BytesIO(sample_grid(pixels, labels, CLASSES, per_class=2, scale=3))))
    side, gap = 24, 4
    right = grid[:, -(2 * (side + gap)) :]
    for label in range(3):
        top = gap + label * (side + gap)
        for column, image in enumerate(pixels[labels == label][:2]):
            tile = right[top : top + side, column * (side + gap) :][:, :side]
            np.testing.assert_array_equal(tile, image.repeat(3, 0).repeat(3, 1))


def test_many_classes_are_cut_and_said_to_be() -> None:
    names = tuple(f"class {k}" for k in range(1000))
    pixels, labels = images(64), np.arange(64)
    few, cut = (Image.open(io.BytesIO(sample_grid(pixels, labels, names[:n], scale=1))) for n in (20, 1000))
    assert few.height < cut.height < 2 * few.height
    text = render_report(report_data(classes=names, samples=pixels, sample_labels=labels))
    assert "The first 20 of 1,000 classes" in text
    assert "class 19<" in text
    assert "class 20<" not in text


def test_class_names_may_hold_any_character() -> None:
    names = ("two\nlines", "\udcff not UTF-8", "")
    assert sample_grid(images(3), np.arange(3), names)
    assert render_report(report_data(classes=names)).encode()


def test_large_images_become_thumbnails() -> None:
    text = render_report(report_data(samples=images(9, 256), untrained=None, real=images(9, 256)))
    assert "data:image/jpeg" in text
    assert len(text) < 2_000_000


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (images(2).astype(np.float32), np.arange(2)),
        (images(2)[:, :4], np.arange(2)),
        (images(2)[0], np.arange(2)),
        (images(2), np.arange(3)),
    ],
)
def test_images_of_the_wrong_shape_are_refused(pixels: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 \\[N, S, S, 3\\]"):
        sample_grid(pixels, labels, CLASSES)
    with pytest.raises(ValueError, match="uint8 \\[N, S, S, 3\\]"):
        render_report(report_data(samples=pixels, sample_labels=labels))


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (0.00123456, "0.001235"), (True, "yes"), (["a", 2], "a, 2"), (1234.5, "1,234")],
)
def test_values_are_shown_for_readers(value: object, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (245, "4 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.2531, "0.253"), (14, "14"), (1930.4, "1,930"), (None, NOTHING)])
def test_three_digits_are_enough(value: float | None, text: str) -> None:
    assert brief(value) == text


@pytest.mark.parametrize(("value", "text"), [(999, "999 B"), (4.2e12, "4.2 TB"), (0, "0 B"), (1e30, "1e+06 YB")])
def test_prefixes(value: float, text: str) -> None:
    assert scaled(value, "B") == text
