"""The report: self-contained, escaped, deterministic, and whole where parts are missing."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edt_core.sample_grid import sample_grid
from pipelines.report import (
    LineageRow,
    ReportData,
    compare_metrics,
    duration,
    render_report,
    shown,
)
from pipelines.report_figures import lineage_graph, training_curves

CLASSES = ("ant", "bee", "cat")


def images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def row(step: str, kind: str, *inputs: str) -> LineageRow:
    fingerprint, digest = (step.encode().hex() * 64)[:64], (kind.encode().hex() * 64)[:64]
    return LineageRow(
        step, kind, fingerprint, digest, inputs, f"s3://store/{kind}", None, 1.5, "c0de", kind == "evaluation"
    )


LINEAGE = (
    row("preprocess", "images", "source"),
    row("autoencoder", "autoencoder", "preprocess"),
    row("encode", "latents", "preprocess", "autoencoder"),
    row("train", "checkpoint", "encode"),
    row("evaluate", "evaluation", "train", "preprocess"),
)
HISTORY = [
    {"step": k, "loss": 3 / k, "loss_full": 1 / k, "loss_masked": 2 / k, "lr": 1e-3, "grad_norm": 1.0}
    for k in range(1, 6)
]


def report_data(**changes: Any) -> ReportData:
    labels = np.arange(9) % 3
    data = ReportData(
        title="edt-tiny version 3",
        config_name="quickstart",
        model={"version": 3, "parameters": 1234567, "aliases": ["candidate", "champion"]},
        decision="became champion: fd_classifier 1.5, before 4",
        classes=CLASSES,
        samples=images(9),
        sample_labels=labels,
        untrained=images(3),
        untrained_labels=labels[:3],
        real=images(9),
        real_labels=labels,
        history=(),
        metrics_before={"fd_classifier": 6.0, "precision": 0.25},
        metrics_after={"fd_classifier": 1.5, "precision": 0.5},
        protocol={"sampler": "ddpm", "num_sampling_steps": 50},
        lineage=LINEAGE,
        config_yaml="name: quickstart\n",
        environment={"python": "3.11"},
    )
    return replace(data, **changes)


class Page(HTMLParser):
    """Collects tags, attributes, and open elements that nothing closed."""

    VOID = frozenset({"meta", "link", "img", "source", "wbr"})

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


def test_page_asks_for_nothing_from_outside() -> None:
    text = render_report(report_data(history=HISTORY))
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    addresses = [value or "" for name, value in page.attributes if name in ("src", "srcset", "href")]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_same_data_gives_the_same_bytes() -> None:
    assert render_report(report_data(history=HISTORY)) == render_report(report_data(history=HISTORY))
    assert sample_grid(images(9), np.arange(9) % 3, CLASSES) == sample_grid(images(9), np.arange(9) % 3, CLASSES)


def test_hostile_text_is_escaped_everywhere() -> None:
    attack = "\"'><script>alert(1)</script>"
    rows = (
        row(attack, attack, "source" + attack),
        replace(row("train", "checkpoint", attack), uri=attack, run_id=attack, code_version=attack),
    )
    text = render_report(
        report_data(
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
        )
    )
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    page = Page(text)
    assert page.open == []
    assert ("aria-label", f"3 generated images of class {attack}") in page.attributes


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
    assert "Untrained</th>" not in text
    unmeasured = render_report(report_data(metrics_before={}, untrained=images(0), untrained_labels=np.arange(0)))
    assert "The untrained model was not measured" in unmeasured


def test_classifier_metrics_are_said_not_to_be_fid() -> None:
    assert "not FID" in render_report(report_data())
    assert "not FID" not in render_report(report_data(metrics_before={}, metrics_after={"fid": 9.6}))


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
        ("accuracy_classifier", 0.5, 0.5, "none", "same"),
        ("novel", 1.0, 2.0, "\N{MULTIPLICATION SIGN} 2", ""),
        ("fid", float("nan"), 2.0, "", ""),
    ],
)
def test_change_of_a_metric(name: str, before: float, after: float, change: str, verdict: str) -> None:
    (compared,) = compare_metrics({name: before}, {name: after})
    assert (compared.change, compared.verdict) == (change, verdict)


def test_curves_show_what_was_recorded() -> None:
    losses, rates = training_curves(HISTORY)
    assert "masked pass loss from 2 at step 1 to 0.4 at step 5" in losses.description
    assert "learning rate" in rates.description
    assert losses.light != losses.dark
    full_only = [{"step": k, "loss": 1.0, "loss_full": 1.0} for k in (1, 2)]
    (figure,) = training_curves(full_only)
    assert "masked" not in figure.description
    assert len(training_curves(HISTORY[:1])) == 2
    assert training_curves([]) == []


def test_a_long_history_does_not_grow_the_page() -> None:
    rng = np.random.default_rng(0)
    short, long = ([{"step": k, "loss": rng.random()} for k in range(n)] for n in (500, 20_000))
    assert len(training_curves(long)[0].light) < 1.2 * len(training_curves(short)[0].light)


def test_steps_of_the_diagram_stand_right_of_their_inputs() -> None:
    graph = lineage_graph(tuple(reversed(LINEAGE)), "model")
    left = {node.lines[0]: node.x for node in graph.nodes}
    for step in LINEAGE:
        assert all(left[name] + graph.node_width < left[step.step] for name in step.inputs)
    assert max(left, key=lambda name: left[name]) == "registry"
    boxes = [(node.x, node.y) for node in graph.nodes]
    for x, y in boxes:
        assert 0 <= y <= graph.height - graph.node_height
        assert all(abs(y - other) > graph.node_height for x2, other in boxes if x2 == x and other != y)
    assert len(set(boxes)) == len(boxes)


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
