"""Pages in a real browser: Debian's chromium, without a window, driven over its DevTools protocol through two pipes.

with Browser() as browser:
    page = browser.open(path, width=400)
    assert page.errors == [] and page.broken_pictures() == []
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

_COMMAND = "chromium"
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # a container's root may not make one; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
# The protocol is spoken on the descriptors 3 and 4. The pipes may have these numbers, the wrong way round: up first.
_LAUNCHER = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 10) for number in sys.argv[1:3]]
for pipe, number in zip(pipes, (3, 4)):
    os.dup2(pipe, number)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_CHUNK = 1 << 16
_A4 = {"paperWidth": 8.27, "paperHeight": 11.69, "marginTop": 0.5, "marginBottom": 0.5}  # inches

# Every piece of text that is shown: its words, where it is, what of that is inside all that clips it, and the left and
# right end of the content of its section.
_TEXTS = """(() => {
  const card = holder => {
    const box = holder.closest('section'), rect = box?.getBoundingClientRect(), style = box && getComputedStyle(box);
    return box && [rect.left + parseFloat(style.paddingLeft), rect.right - parseFloat(style.paddingRight)];
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node, number = 0; (node = walker.nextNode()); number++) {
    const holder = node.parentElement, words = node.textContent.trim().slice(0, 60);
    if (!words || ['STYLE', 'SCRIPT', 'TITLE', 'title'].includes(holder.tagName)) continue;
    if (!holder.checkVisibility({visibilityProperty: true, contentVisibilityAuto: true})) continue;
    let clip = [-Infinity, -Infinity, Infinity, Infinity], scrolls = false, ellipsis = false, hidden = false;
    for (let box = holder; box && box !== document.documentElement; box = box.parentElement) {
      const style = getComputedStyle(box), rect = box.getBoundingClientRect();
      if (style.clipPath !== 'none') hidden = true;
      if (box === document.body || style.overflowX === 'visible' || style.display === 'inline') continue;
      if (box instanceof SVGElement && box.tagName !== 'svg') continue;
      if (['auto', 'scroll'].includes(style.overflowX)) scrolls = true;
      if (style.textOverflow === 'ellipsis') ellipsis = true;
      clip = [Math.max(clip[0], rect.left), Math.max(clip[1], rect.top),
              Math.min(clip[2], rect.right), Math.min(clip[3], rect.bottom)];
    }
    if (hidden) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects())
      if (r.width > 0.5 && r.height > 0.5)
        found.push({number, words, clip, scrolls, ellipsis, card: card(holder),
                    at: [r.left, r.top, r.right, r.bottom]});
  }
  return found.map(text => ({...text, clip: text.clip.map(v => Number.isFinite(v) ? v : null)}));
})()"""
_SETTLED = (
    "Promise.all([document.fonts.ready, ...[...document.images].map(i => i.decode().catch(() => 0))]).then(() => 1)"
)
_PICTURES = "[...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.src.slice(0, 60)])"


class Browser:
    """One chromium with a new profile, for as long as the context lasts. Skips the test where there is none."""

    def __init__(self) -> None:
        if shutil.which(_COMMAND) is None:
            pytest.skip("there is no chromium on PATH (Debian: apt-get install chromium)")
        self._number = 0
        self._buffer = b""

    def __enter__(self) -> "Browser":
        self._profile = mkdtemp(prefix="edt-browser-")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        flags = [*_FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        launched = [sys.executable, "-ISc", _LAUNCHER, str(theirs_in), str(theirs_out), _COMMAND, *flags]
        # What it says of D-Bus and the like is of no interest here.
        self._process = subprocess.Popen(launched, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, EOFError):
            self.call("Browser.close")
        os.close(self._in)
        os.close(self._out)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, page: Path | str, width: int, height: int = 900, dark: bool = False, paper: bool = False) -> "Page":
        """A page in a tab of its own, when its pictures are there. `page`: a file, or an address.

        `width`, `height`: of the window in CSS px; up to 600 px it is a phone's. `paper`: with the styles of print.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        opened = Page(self, session)
        phone = width <= 600
        for domain in ("Page", "Runtime", "Log", "Network"):
            opened.call(f"{domain}.enable")
        opened.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        opened.call("Emulation.setEmulatedMedia", media="print" if paper else "", features=[theme])
        address = page.absolute().as_uri() if isinstance(page, Path) else page
        if problem := opened.call("Page.navigate", url=address).get("errorText"):
            opened.errors.append(f"{address}: {problem}")
            return opened
        opened.wait_for("Page.loadEventFired")
        opened.evaluate(_SETTLED)
        return opened

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to one command. Raises RuntimeError where it is an error, EOFError where the browser is gone."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        for answer in self.messages():
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
        raise AssertionError("messages end with an error")

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the browser says, as it comes; events are noted on their pages."""
        while True:
            while b"\0" not in self._buffer:
                more = os.read(self._in, _CHUNK)
                if not more:
                    raise EOFError("chromium ended")
                self._buffer += more
            text, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(text)
            if page := Page.of_session.get(message.get("sessionId", "")):
                page.note(message)
            yield message


class Page:
    """A page that is open, and what happened in it."""

    of_session: dict[str, "Page"] = {}  # noqa: RUF012  of all browsers; a session's id is unique

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.errors: list[str] = []  # console errors and warnings, exceptions, and what could not be loaded
        self.requests: list[str] = []  # addresses asked for, but for the page's own data: ones
        self._events: set[str] = set()
        Page.of_session[session] = self

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def wait_for(self, event: str) -> None:
        """Return when an event has come, which may have been before."""
        if event not in self._events:
            for _ in self.browser.messages():
                if event in self._events:
                    return

    def note(self, message: dict[str, Any]) -> None:
        """Keep of a message what a test may ask for."""
        event, params = message.get("method", ""), message.get("params", {})
        self._events.add(event)
        if event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value")) for part in params["args"]))
        elif event == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif event == "Network.loadingFailed":
            self.errors.append(f"not loaded: {params['errorText']} {params.get('blockedReason', '')}".strip())
        elif event == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it comes to."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def overflow(self) -> int:
        """Px that the page is wider than its window; 0 where nobody has to scroll sideways."""
        return int(self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def broken_pictures(self) -> list[str]:
        """The beginnings of the addresses of pictures that hold nothing, or are shown with no width."""
        return [source for natural, shown, source in self.evaluate(_PICTURES) if not natural or not shown]

    def pictures(self) -> int:
        return int(self.evaluate("document.images.length"))

    def cut_texts(self) -> list[str]:
        """Texts that something cuts off for good: neither can one scroll to the rest, nor does an ellipsis say so."""
        texts = self.evaluate(_TEXTS)
        return sorted({t["words"] for t in texts if not t["scrolls"] and not t["ellipsis"] and _sticks_out(t)})

    def overhanging_texts(self) -> list[str]:
        """Texts that reach over the left or right end of their section."""
        texts = self.evaluate(_TEXTS)
        return sorted({text["words"] for text in texts if text["card"] and _overhangs(text)})

    def overlapping_texts(self) -> list[tuple[str, str]]:
        """Pairs of texts of which one is drawn over the other."""
        texts = self.evaluate(_TEXTS)
        shown = sorted(((_visible(text), text) for text in texts), key=lambda pair: pair[0][1])
        found = set()
        for place, (box, text) in enumerate(shown):
            for other, another in shown[place + 1 :]:
                if other[1] >= box[3]:
                    break  # in order of their upper ends: all others begin further down
                if text["number"] != another["number"] and _overlap(box, other):
                    found.add((text["words"], another["words"]))
        return sorted(found)

    def screenshot(self, path: Path | None = None) -> bytes:
        """The whole page as a PNG, also written to `path`."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return _kept(answer["data"], path)

    def pdf(self, path: Path | None = None) -> bytes:
        """The page as it is printed on A4, also written to `path`."""
        answer = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True, **_A4)
        return _kept(answer["data"], path)

    def close(self) -> None:
        self.call("Page.close")


_ROUNDING = 1.5  # px: glyphs may reach a little over the box that is stated for their line


def _visible(text: dict[str, Any]) -> list[float]:
    """The part [left, top, right, bottom] of a text that nothing clips."""
    left, top, right, bottom = text["clip"]
    box = text["at"]
    ends = ((left, max), (top, max), (right, min), (bottom, min))
    return [value if end is None else pick(value, end) for value, (end, pick) in zip(box, ends, strict=True)]


def _sticks_out(text: dict[str, Any]) -> bool:
    return any(abs(a - b) > _ROUNDING for a, b in zip(text["at"], _visible(text), strict=True))


def _overhangs(text: dict[str, Any]) -> bool:
    (left, right), shown = text["card"], _visible(text)
    return bool(shown[0] < left - _ROUNDING or shown[2] > right + _ROUNDING)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes have more in common than rounding; line boxes of one text touch, and do not."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width > _ROUNDING and height > 2 * _ROUNDING


def _kept(data: str, path: Path | None) -> bytes:
    content = base64.b64decode(data)
    if path is not None:
        path.write_bytes(content)
    return content
