"""The report for everybody: axe-core's rules of WCAG 2 A and AA, contrast, the keyboard, and nothing that moves."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from pipelines.outcome import Outcome
from pipelines.report.page import render_report
from tests.support.browser import Browser, Page
from tests.support.contrast import OTHER, TEXT, contrast
from tests.support.reports import fullest_report_data
from tests.support.small import MODEL

pytestmark = pytest.mark.extern

LOOKS = [(400, False), (400, True), (1400, False), (1400, True)]  # width in px, dark
_LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
_RUN = f"""axe.run(document, {{runOnly: {{type: "tag", values: {_LEVELS}}}}}).then(result => Object.fromEntries(
    ["violations", "incomplete", "passes"].map(kind => [kind, result[kind].map(
        rule => [rule.id, rule.nodes.map(node => node.html.slice(0, 120))])])))"""


@dataclass(frozen=True)
class Audit:
    """What axe-core found, by rule: elements that violate it, that it cannot judge, and that keep it."""

    violations: dict[str, list[str]]
    incomplete: dict[str, list[str]]
    passes: dict[str, list[str]]

    @classmethod
    def of(cls, page: Page) -> "Audit":
        page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text() + "; 1")
        return cls(**{kind: dict(rules) for kind, rules in page.evaluate(_RUN).items()})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(fullest_report_data()))
    return path


def check(page: Page) -> None:
    """No violation; what axe cannot judge is the text in the diagram, which another test measures."""
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    audit = Audit.of(page)
    assert audit.violations == {}
    assert {"color-contrast", "image-alt", "th-has-data-cells", "document-title"} <= audit.passes.keys()
    assert audit.incomplete.keys() <= {"color-contrast"}
    assert all(html.startswith("<text") for html in audit.incomplete.get("color-contrast", ()))


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_a_report_of_every_part_violates_no_rule(browser: Browser, full_page: Path, width: int, dark: bool) -> None:
    page = browser.open(full_page, width, dark=dark)
    check(page)
    page.close()


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_the_report_of_a_run_violates_no_rule(browser: Browser, first: Outcome, width: int, dark: bool) -> None:
    page = browser.open(first.reports[MODEL].path("report.html"), width, dark=dark)
    check(page)
    page.close()


def test_violations_are_found(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("""<!doctype html><html><body><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">
        <p style="color: #aaa">pale</p><div style="overflow: auto; height: 20px"><p>long</p><p>text</p></div>
        <a href="#"></a></body></html>""")
    page = browser.open(path, 400)
    expected = {"image-alt", "color-contrast", "document-title", "html-has-lang", "link-name"}
    assert expected <= Audit.of(page).violations.keys()
    page.close()


_DIAGRAM = """(() => {
    const colour = (element, name) => getComputedStyle(element)[name];
    const shown = [...document.querySelectorAll('.graph')].find(graph => graph.checkVisibility());
    const texts = [...shown.querySelectorAll('text')].map(
        text => [colour(text, 'fill'), colour(text.parentElement.querySelector('rect'), 'fill')]);
    const card = colour(shown.closest('section'), 'backgroundColor');
    return [texts, [...shown.querySelectorAll('g ~ path, svg > path')].map(path => [colour(path, 'stroke'), card])];
})()"""


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_the_diagram_has_contrast(browser: Browser, full_page: Path, width: int, dark: bool) -> None:
    page = browser.open(full_page, width, dark=dark)
    texts, edges = page.evaluate(_DIAGRAM)
    assert min(len(texts), len(edges)) > 5
    assert [pair for pair in texts if contrast(*pair) < TEXT] == []
    assert [pair for pair in edges if contrast(*pair) < OTHER] == []
    page.close()


def press(page: Page, key: str, code: int, text: str = "") -> None:
    """A key of the keyboard, down and up."""
    about: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
    page.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
    page.call("Input.dispatchKeyEvent", type="keyUp", **about)


_REACHABLE = "[...document.querySelectorAll('a[href], summary, [tabindex]')].filter(e => e.checkVisibility())"
_FOCUSED = f"""(() => {{
    const focused = document.activeElement, style = getComputedStyle(focused);
    return [{_REACHABLE}.indexOf(focused), style.outlineStyle, parseFloat(style.outlineWidth), style.outlineColor,
            getComputedStyle(focused.closest('section:not(.plain)') ?? document.body).backgroundColor];
}})()"""
_SCROLLING = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
    && (['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth
        || ['auto', 'scroll'].includes(getComputedStyle(e).overflowY) && e.scrollHeight > e.clientHeight))
    .map(e => e.tabIndex)"""


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_the_keyboard_reaches_everything_and_the_focus_is_seen(
    browser: Browser, full_page: Path, width: int, dark: bool
) -> None:
    page = browser.open(full_page, width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    number = page.evaluate(f"{_REACHABLE}.length")
    assert number > 12
    for place in range(number):
        press(page, "Tab", 9)
        at, style, outline, colour, behind = page.evaluate(_FOCUSED)
        assert at == place  # in the order of the page
        assert (style, outline >= 2) == ("solid", True)
        assert contrast(colour, behind) >= OTHER
    assert all(index >= 0 for index in page.evaluate(_SCROLLING))
    page.close()


def test_a_narrow_page_has_something_to_scroll(browser: Browser, full_page: Path) -> None:
    """So that the test above is about something."""
    page = browser.open(full_page, 400)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.evaluate("document.querySelectorAll('.long-text').forEach(pre => pre.textContent = 'x'.repeat(500))")
    assert page.evaluate(_SCROLLING) == [0]
    page.close()


def test_what_is_folded_opens_by_the_keyboard(browser: Browser, full_page: Path) -> None:
    page = browser.open(full_page, 1400)
    page.evaluate("document.querySelector('details:not([open]) summary').focus()")
    is_open = "document.activeElement.parentElement.open"
    assert page.evaluate(is_open) is False
    press(page, "Enter", 13, "\r")
    assert page.evaluate(is_open) is True
    page.close()


@pytest.mark.parametrize("preference", ["reduce", "no-preference"])
def test_nothing_moves(browser: Browser, full_page: Path, preference: str) -> None:
    page = browser.open(full_page, 1400)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": preference}])
    assert page.evaluate("matchMedia('(prefers-reduced-motion: reduce)').matches") == (preference == "reduce")
    assert page.evaluate("document.getAnimations().length") == 0
    moving = "s => s.transitionDuration !== '0s' || s.animationName !== 'none' || s.scrollBehavior === 'smooth'"
    assert (
        page.evaluate(f"[...document.querySelectorAll('*')].map(e => getComputedStyle(e)).filter({moving}).length") == 0
    )
    page.close()
