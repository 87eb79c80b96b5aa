"""Tables for people: they fit the terminal, no word is broken, and digests are short."""

import os
import pty
import struct
import sys
import termios
from fcntl import ioctl

import pytest

from edt_core.printing.table import fitted, screen_width, short, table_lines

DIGEST, RUN, COMMIT = "0123456789abcdef" * 4, "fedcba9876543210" * 2, "89abcdef01" * 4
ROWS = [
    {
        "action": "run",
        "step": "untrained evaluate edt-tiny-digits-32",
        "fingerprint": DIGEST,
        "run": None,
        "why": "num_sampling_steps 3 -> 25, num_samples 40 -> 400, unit_size 20 -> 64 and 3 more",
    },
    {
        "action": "reuse",
        "step": "preprocess",
        "fingerprint": DIGEST[::-1],
        "run": RUN,
        "why": "made 2026-11-29T09:48:18Z in 10 s",
    },
]
COLUMNS = ("action", "step", "fingerprint", "run", "why")


@pytest.mark.parametrize("width", [60, 80, 100, 120, None])
def test_a_table_fits_the_terminal_and_breaks_no_word(width: int | None) -> None:
    lines = list(table_lines(ROWS, COLUMNS, width, extra=("run", "fingerprint")))
    assert all(len(line) <= (width or 1000) for line in lines)
    words = " ".join(lines).split()
    for word in ("num_sampling_steps", "edt-tiny-digits-32", "unit_size", "preprocess", "untrained", "2026-11-29"):
        assert word in words
    assert any("2026-11-29 09:48Z in" in line for line in lines)  # a time stays on one line
    assert not any(len(word) > 20 for word in words)
    if width in (None, 100, 120):
        assert DIGEST[:12] in words
        assert RUN[:12] in words
    else:
        assert lines[-1] == "(no room for run, fingerprint; --json lists everything)"
    if width is None:
        assert len(lines) == 1 + len(ROWS)


def test_without_room_for_the_columns_each_row_is_a_list_and_nothing_is_lost() -> None:
    rows = [{"field": "autoencoder.pretrained", "a": "/a/path/of/some/length", "b": "a text of words"}] * 2
    lines = list(table_lines(rows, ("field", "a", "b"), 40))
    assert lines == [
        *("field  autoencoder.pretrained", "a      /a/path/of/some/length", "b      a text of words"),
        "",
        *("field  autoencoder.pretrained", "a      /a/path/of/some/length", "b      a text of words"),
    ]


def test_numbers_and_what_is_missing_have_their_texts() -> None:
    lines = list(table_lines([{"x": 1.23456789, "y": None, "z": "a\nb"}], ("x", "y", "z"), None))
    assert lines == ["x      y  z", "1.235  -  a\\nb"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (DIGEST, DIGEST[:12]),
        (f"{{'classifier': '{DIGEST}'}}", f"{{'classifier': '{DIGEST[:12]}'}}"),
        (f"{COMMIT}+dirty by run {RUN}", f"{COMMIT[:12]}+dirty by run {RUN[:12]}"),
        (f"/store/latents/{DIGEST}", f"/store/latents/{DIGEST}"),  # a path can be copied
        ("0123456789abcdef", "0123456789abcdef"),
        ("at 2026-11-29T09:48:18Z", "at 2026-11-29 09:48Z"),
    ],
)
def test_digests_and_times_are_short(text: str, shown: str) -> None:
    assert short(text) == shown


def test_a_line_is_broken_at_spaces_and_what_continues_is_indented() -> None:
    assert fitted("  images 0123  digest 4567  image_size=32, decoder=pillow", 30, 6) == (
        "  images 0123  digest 4567\n      image_size=32,\n      decoder=pillow"
    )
    assert fitted("a line of some length", None, 2) == "a line of some length"
    assert fitted("/a/path/that/is/longer/than/that and more", 20, 2) == "/a/path/that/is/longer/than/that\n  and more"


def test_only_a_terminal_has_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "33")
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 72, 0, 0))
    with os.fdopen(ours), os.fdopen(theirs, "w") as terminal, open(os.devnull, "w") as nothing:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert screen_width() == 72
        monkeypatch.setattr(sys, "stdout", nothing)
        assert screen_width() is None
