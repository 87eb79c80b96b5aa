"""The tool that records a command in a terminal for the README."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pyte
import pytest

from tests.docs.recording import THEMES, chosen, frame_of, main, svg

DRAW = r"printf 'one \033[32mgreen\033[0m \033[1m<b>\033[0m\r\nlast line'"


def test_spans_have_the_style_and_column_of_their_text() -> None:
    screen = pyte.Screen(30, 3)
    pyte.Stream(screen).feed("a \033[31mred\033[0m  b")
    assert frame_of(screen) == (
        ((0, "a", "default", False), (2, "red", "red", False), (5, "  b", "default", False)),
        (),
        (),
    )


def test_frames_are_chosen_with_the_first_and_the_last() -> None:
    frames = [(((0, str(k), "default", False),),) for k in range(100)]
    some = chosen(frames, 7)
    assert (len(some), some[0], some[-1]) == (7, frames[0], frames[-1])
    assert chosen(frames[:3], 7) == frames[:3]


def test_a_command_becomes_two_drawings_whose_last_frame_is_its_last_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--title", "<edt>", "--hide", "last "]
    monkeypatch.setattr(sys, "argv", ["recording", str(tmp_path / "a"), *options, "--", "sh", "-c", DRAW])
    main()
    for name in THEMES:
        root = ET.parse(tmp_path / f"a-{name}.svg").getroot()
        assert root.attrib["aria-label"] == "<edt>"
        frames = [group for group in root if group.attrib.get("class", "").startswith("frame")]
        assert "last" in frames[-1].attrib["class"]
        assert [text.text for text in frames[-1]] == ["one", "green", "<b>", "line"]


def test_a_command_that_fails_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recording", str(tmp_path / "a"), "--", "sh", "-c", "exit 3"])
    with pytest.raises(SystemExit, match="exit status 3"):
        main()
    assert not list(tmp_path.iterdir())


def test_each_frame_is_shown_in_its_turn() -> None:
    frames = [(((0, str(k), "default", False),),) for k in range(3)]
    drawing = svg(frames, THEMES["light"], "t", 10, 1, 1.0)
    # Three frames in ten seconds: one, one, and the last for eight.
    assert "@keyframes f0{0.000%,9.999%{visibility:visible}10.000%,100%{visibility:hidden}}" in drawing
    assert "@keyframes f2{0%,19.999%{visibility:hidden}20.000%,100.000%{visibility:visible}}" in drawing
