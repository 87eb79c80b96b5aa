"""A recording of a command in a terminal, as two animated SVG files: for light and for dark pages.

    python tests/docs/recording.py docs/quickstart -- edt run quickstart --store /tmp/new-store

writes docs/quickstart-light.svg and docs/quickstart-dark.svg. The command runs in a pseudo-terminal, and `pyte` follows
what it draws. Frames are chosen evenly among the different screens, so that a run of minutes plays in half a minute.
With reduced motion only the last frame is shown.
"""

import argparse
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fcntl import ioctl
from html import escape
from itertools import groupby
from pathlib import Path

import pyte

CELL_W, CELL_H, MARGIN, BAR = 8.4, 18, 16, 34  # px
SAMPLE_S = 0.25  # between two looks at the screen
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# Where nothing is animated, the last frame is seen.
STYLE = f"text{{font:14px {FONT};white-space:pre}}.bold{{font-weight:bold}}"
STYLE += ".frame{visibility:hidden}.frame.last{visibility:visible}"
STILL = "@media (prefers-reduced-motion: reduce){.frame{animation:none!important}}"


@dataclass(frozen=True)
class Theme:
    """Colours of the window, of text, and of the terminal's colour names."""

    back: str
    bar: str
    text: str
    dim: str
    colours: dict[str, str]


THEMES = {
    "light": Theme(
        "#ffffff",
        "#eceff1",
        "#24292f",
        "#6e7781",
        {"green": "#116329", "red": "#cf222e", "brown": "#7d4e00", "blue": "#0550ae", "magenta": "#8250df"}
        | {"cyan": "#1b7c83", "white": "#6e7781", "black": "#24292f"},
    ),
    "dark": Theme(
        "#0d1117",
        "#21262d",
        "#e6edf3",
        "#8b949e",
        {"green": "#3fb950", "red": "#ff7b72", "brown": "#d29922", "blue": "#79c0ff", "magenta": "#d2a8ff"}
        | {"cyan": "#39c5cf", "white": "#b1bac4", "black": "#484f58"},
    ),
}

Span = tuple[int, str, str, bool]  # first column, text, colour name, bold
Frame = tuple[tuple[Span, ...], ...]  # spans of each line


def record(command: Sequence[str], columns: int, lines: int) -> Iterator[Frame]:
    """The different screens of a command, in order. Raises CalledProcessError if it fails."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(lines)}
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    screen = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(screen)
    looked, is_open, last = 0.0, True, None
    while is_open:
        if select.select([ours], [], [], SAMPLE_S)[0]:
            try:
                stream.feed(os.read(ours, 1 << 16))
            except OSError:  # the last process with the terminal has ended
                is_open = False
        if time.monotonic() - looked >= SAMPLE_S or not is_open:
            looked, frame = time.monotonic(), frame_of(screen)
            if frame != last:
                yield frame
            last = frame
    if code := child.wait():
        raise subprocess.CalledProcessError(code, list(command))


def frame_of(screen: pyte.Screen) -> Frame:
    """The text on a screen, as spans of one style."""
    frame = []
    for number in range(screen.lines):
        cells = [screen.buffer[number][column] for column in range(screen.columns)]
        spans, column = [], 0
        for (colour, bold), group in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            text = "".join(cell.data for cell in group)
            if text.strip():
                spans.append((column, text.rstrip(), colour, bold))
            column += len(text)
        frame.append(tuple(spans))
    return tuple(frame)


def without(frame: Frame, text: str) -> Frame:
    """A frame in which a text, such as the path of a folder, is left out."""
    return tuple(
        tuple((column, shown.replace(text, ""), colour, bold) for column, shown, colour, bold in line) for line in frame
    )


def chosen(frames: Sequence[Frame], number: int) -> list[Frame]:
    """At most so many frames at even distances, the first and the last among them."""
    if len(frames) <= number:
        return list(frames)
    return [frames[round(k * (len(frames) - 1) / (number - 1))] for k in range(number)]


def svg(frames: Sequence[Frame], theme: Theme, title: str, columns: int, lines: int, frame_s: float) -> str:
    """An animated SVG: every frame for `frame_s` seconds, the last one eight times as long."""
    width, height = 2 * MARGIN + columns * CELL_W, BAR + 2 * MARGIN + lines * CELL_H
    total = frame_s * (len(frames) + 7)
    rules, groups = [], []
    for number, frame in enumerate(frames):
        is_last = number == len(frames) - 1
        start, end = 100 * number * frame_s / total, 100.0 if is_last else 100 * (number + 1) * frame_s / total
        hidden = "" if number == 0 else f"0%,{start - 0.001:.3f}%{{visibility:hidden}}"
        after = "" if is_last else f"{end:.3f}%,100%{{visibility:hidden}}"
        shown = f"{start:.3f}%,{end - 0.001 if not is_last else 100:.3f}%{{visibility:visible}}"
        rules.append(f"@keyframes f{number}{{{hidden}{shown}{after}}}")
        rules.append(f"#f{number}{{animation:f{number} {total:.2f}s step-end infinite}}")
        groups.append(f'<g id="f{number}" class="frame{" last" if is_last else ""}">{drawn(frame, theme)}</g>')
    dots = "".join(f'<circle cx="{MARGIN + 6 + 18 * k}" cy="{BAR / 2}" r="5" fill="{theme.dim}"/>' for k in range(3))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><style>{STYLE}{"".join(rules)}{STILL}</style>'
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{theme.back}" stroke="{theme.bar}"/>'
        f'<path d="M0 8a8 8 0 0 1 8-8h{width - 16:g}a8 8 0 0 1 8 8v{BAR - 8}H0z" fill="{theme.bar}"/>{dots}'
        f'<text x="{width / 2:g}" y="{BAR / 2 + 5:g}" text-anchor="middle" fill="{theme.dim}">{escape(title)}</text>'
        f"{''.join(groups)}</svg>\n"
    )


def drawn(frame: Frame, theme: Theme) -> str:
    """The spans of a frame as text elements. `textLength` keeps the columns with any monospaced font."""
    parts = []
    for number, line in enumerate(frame):
        y = BAR + MARGIN + (number + 0.75) * CELL_H
        for column, text, name, bold in line:
            colour = theme.text if name == "default" else theme.colours.get(name, theme.dim)
            weight = ' class="bold"' if bold else ""
            parts.append(
                f'<text x="{MARGIN + column * CELL_W:.1f}" y="{y:g}" fill="{colour}"{weight} xml:space="preserve" '
                f'textLength="{len(text) * CELL_W:.1f}" lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'
            )
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the files begin with this: OUT-light.svg and OUT-dark.svg")
    parser.add_argument("command", nargs="+", help="the command, after --")
    parser.add_argument("--title", help="what the window is called [default: the command]")
    parser.add_argument("--hide", default="", help="a text that is left out, such as the path of a temporary folder")
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--lines", type=int, default=32)
    parser.add_argument("--frames", type=int, default=28)
    parser.add_argument("--frame-s", type=float, default=0.8)
    arguments = parser.parse_args()
    title = arguments.title or " ".join(arguments.command)
    try:
        frames = list(record(arguments.command, arguments.columns, arguments.lines))
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error}")
    frames = [without(frame, arguments.hide) for frame in chosen(frames, arguments.frames)]
    used = max(number for frame in frames for number, line in enumerate(frame) if line) + 1
    for name, theme in THEMES.items():
        path = arguments.out.with_name(f"{arguments.out.name}-{name}.svg")
        path.write_text(svg(frames, theme, title, arguments.columns, used, arguments.frame_s), encoding="utf-8")
        print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
