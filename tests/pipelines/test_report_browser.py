"""The report in a real browser: whole, silent, and readable on a phone, on a screen, and on paper."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.outcome import Outcome
from pipelines.report.page import render_report
from tests.support.browser import Browser, Page
from tests.support.reports import COSTS, HISTORY, REGISTRY, images, neighbourhood, whole_report_data
from tests.support.small import MODEL

pytestmark = pytest.mark.extern

A4 = 703  # px between the margins
LONG = ("a class with many words, as ImageNet has them", "Donaudampfschifffahrtsgesellschaft" * 2, "2")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of photos, with names, numbers and lists as long as they come."""
    champion = REGISTRY.champions[1]
    champions = [
        champion.model_copy(update={"version": str(k), "value": 20.0 - k, "comparable": k % 3 > 0})
        for k in range(1, 13)
    ]
    record: dict[str, Any] = {"metric": "fd_of_a_long_name_classifier", "champions": tuple(champions)}
    record["found_with"] = "--store s3://" + "b" * 90
    data = whole_report_data(
        title="an-edt-of-a-name-without-an-end-s-2-512 version 1234",
        decision="forced, new champion: fd_classifier 1.5; " + "failed the check of the required limits; " * 3,
        classes=LONG,
        samples=images(9, 128),
        untrained=images(3, 128),
        real=images(9, 128),
        neighbours=neighbourhood(128),
        metrics_after={f"{name}_of_a_long_name_classifier": 123456.789 for name in ("fd", "precision", "kid")},
        metrics_before={f"{name}_of_a_long_name_classifier": 0.000123 for name in ("fd", "precision", "kid")},
        registry=REGISTRY.model_copy(update=record),
        costs=[replace(cost, step=f"untrained {cost.step} of a long name", seconds=1e6) for cost in COSTS],
        protocol={"sampler": "ddpm", "seed": 0, "repeats": 1} | {f"reference_{k}": str(k) * 64 for k in range(6)},
        history=[{**row, "step": 1e6 * row["step"]} for row in HISTORY],
        final_losses=np.linspace(1, 2, 1000),
        config_yaml="name: quickstart\nlong: " + "x" * 300,
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(data))
    return path


def check(page: Page) -> None:
    """Silent, asking for nothing but itself, with all its pictures, and all of its text to be read."""
    assert page.errors == []
    assert len(page.requests) == 1
    assert page.broken_pictures() == []
    assert page.overflow() == 0
    assert page.cut_texts() == []
    assert page.overhanging_texts() == []
    assert page.overlapping_texts() == []


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_a_page_of_long_names_is_readable_at_any_width(browser: Browser, long_page: Path, width: int) -> None:
    page = browser.open(long_page, width)
    check(page)
    assert page.pictures() == 9 + 3 + 9 + 8 + 6  # generated, untrained and real, neighbours, figures
    page.close()


@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_of_a_run_is_readable(browser: Browser, first: Outcome, width: int) -> None:
    page = browser.open(first.reports[MODEL].path("report.html"), width)
    check(page)
    links = page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert len(links) > 5
    assert all(page.evaluate(f"document.querySelector({link!r}) !== null") for link in links)
    page.close()


# Of each diagram that is shown: its direction, and whether it fits without scrolling.
SHOWN_DIAGRAMS = """[...document.querySelectorAll('#lineage .scroll:has(svg)')].filter(box => box.checkVisibility())
    .map(box => [box.classList[1], box.scrollWidth <= box.clientWidth])"""


@pytest.mark.parametrize(("width", "way"), [(360, "down"), (400, "down"), (1100, "down"), (1400, "across")])
def test_the_whole_lineage_is_seen_at_once(browser: Browser, first: Outcome, width: int, way: str) -> None:
    page = browser.open(first.reports[MODEL].path("report.html"), width)
    assert page.evaluate(SHOWN_DIAGRAMS) == [[way, True]]
    page.close()


def test_figures_follow_the_theme(browser: Browser, long_page: Path) -> None:
    shown = {}
    for dark in (False, True):
        page = browser.open(long_page, 1400, dark=dark)
        check(page)
        figures = page.evaluate("[...document.querySelectorAll('picture img')].map(i => i.currentSrc)")
        shown[dark] = [page.evaluate("getComputedStyle(document.body).backgroundColor"), *figures]
        page.close()
    assert all(light != dark for light, dark in zip(shown[False], shown[True], strict=True))


def test_nothing_is_missing_on_paper(browser: Browser, long_page: Path) -> None:
    page = browser.open(long_page, A4, paper=True)
    check(page)  # nobody scrolls on paper
    assert page.evaluate("[...document.querySelectorAll('pre')].every(p => p.checkVisibility())")
    inside = "[...document.querySelectorAll('.scroll')].every(b => b.scrollWidth <= b.clientWidth)"
    assert page.evaluate(inside)
    assert [way for way, _ in page.evaluate(SHOWN_DIAGRAMS)] == ["down"]
    assert page.evaluate("getComputedStyle(document.querySelector('tfoot')).display") == "table-row-group"  # once
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") > 1
    page.close()


def test_what_is_wrong_with_a_page_is_found(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("""<!doctype html><meta name="viewport" content="width=device-width">
        <script>console.error("an error"); throw new Error("an exception")</script>
        <img src="data:image/png;base64,AAAA"><img src="missing.png">
        <div style="width: 900px">wide</div>
        <p style="width: 40px; overflow: hidden; white-space: nowrap">words that are cut</p>
        <section style="width: 50px; padding: 0">overhangingwords</section>
        <p style="margin: 0">below</p><p style="margin: -20px 0 0">above</p>""")
    page = browser.open(path, 400)
    told = "\n".join(page.errors)
    assert "an error" in told
    assert "Uncaught" in told
    assert "ERR_FILE_NOT_FOUND" in told
    assert len(page.requests) == 2
    assert len(page.broken_pictures()) == 2
    assert page.overflow() > 400
    assert page.cut_texts() == ["words that are cut"]
    assert page.overhanging_texts() == ["overhangingwords"]
    assert page.overlapping_texts() == [("above", "below")]
    page.close()
