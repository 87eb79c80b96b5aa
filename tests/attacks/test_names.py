"""Names of files and classes with escape sequences, line breaks and marks of direction: shown escaped, everywhere."""

import io
import os
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.images import encode_png
from edt_core.errors import UserError
from edt_core.printing.console import on_one_line, printable, say
from edt_core.progress import CollectedWarnings, Printed
from edt_core.store.artifact import ArtifactWriter
from edt_core.store.digests import listing
from edt_core.store.folder import Folder
from jobs.runtime.board import Shown
from jobs.runtime.failure import kept_traceback, tell_failure
from jobs.stages.preprocess import STAGE, image_source
from pipelines.commands.options import print_rows
from pipelines.terminal.run_log import RunLog
from pipelines.terminal.terminal import Terminal
from tests.support.small import edt

EVIL = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "bell": "a\x07b",
    "control sequence of one byte": "a\x9b31m",
    "right to left": "a\u202egnp.exe",
    "isolate": "a\u2066b\u2069",
    "carriage return": "good\rbad",
    "backspace": "bad\b\b\bgood",
    "line separator": "a\u2028b",
    "not UTF-8": "a\udcffb",
    "delete": "a\x7fb",
}
_RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")
PNG = encode_png(Image.new("RGB", (40, 40), "red"))


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL)
def test_a_name_is_printable(name: str) -> None:
    for escaped in (printable(name), on_one_line(name)):
        assert not _RAW.search(escaped)
        assert "\\" in escaped
        assert printable(escaped) == escaped


def test_line_breaks_stay_in_texts_and_not_in_names() -> None:
    assert printable("a\n\tb") == "a\n\tb"
    assert on_one_line("a\n\tb") == "a\\n\\tb"
    assert listing(["a\nerror: b"]) == "a\\nerror: b"


@pytest.mark.parametrize("text", ["München", "日本語", "سلام", "👩‍🚀", "[red]", "C:\\x", "ß", "a b"])
def test_names_of_people_stay_as_they_are(text: str) -> None:
    assert printable(text) == on_one_line(text) == text


def test_what_a_stream_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("café", nl=False)
    assert raw.getvalue() == b"caf\\xe9"


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL)
def test_every_way_out_escapes(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tell_failure(UserError(f"there is no {name}"))
    tell_failure(RuntimeError(name))
    Printed("verb").warn(name)
    Printed("verb", interval_s=0).update(1, 2, name)
    print_rows([{"name": name, "value": f"{name}\n"}], ("name", "value"), as_json=False)
    print_rows([{"name": name}], ("name",), as_json=True)
    terminal = Terminal()
    terminal.warn(name)
    terminal.say(name, "red")
    terminal.show({"step": Shown(1, 2, name, name)}, [("step", name)])
    terminal.skipped("step", f"{name}")
    done = capsys.readouterr()
    assert not _RAW.search(done.out + done.err)
    assert not _RAW.search(kept_traceback(RuntimeError(name), tmp_path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL)
def test_a_tree_on_a_terminal_escapes(name: str, tmp_path: Path) -> None:
    from rich.console import Console

    terminal = Terminal()
    terminal.tree.get("step").count(Shown(1, 2, name, name))
    terminal.tree.get("other").state = "failed"
    terminal.tree.get("other").note = name
    screen = io.StringIO()
    Console(file=screen, force_terminal=False, width=200).print(terminal._rendered())
    assert not _RAW.search(screen.getvalue())
    assert printable(name)[:5] in screen.getvalue()


def test_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    for text in ("[red]", "[/red]", "[link=http://x]y[/link]", "[bold", "\\[red]"):
        terminal.say(text)
        terminal.warn(text)
    told = capsys.readouterr().out
    for text in ("[red]", "[/red]", "[link=http://x]y[/link]", "[bold", "\\[red]"):
        assert f"\n{text}\n" in f"\n{told}"
        assert f"warning: {text}\n" in told


def test_the_log_of_a_run_is_clean_once_it_is_over(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.touch()
    log = RunLog(path)
    for name in EVIL.values():
        log.write(name)
        assert not _RAW.search(path.read_text(encoding="utf-8"))
    with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write("\x1b[32mgreen\x1b[0m\r\nbar 1%\rbar 2%\r\n" + "".join(f"{name}\n" for name in EVIL.values()))
    assert not _RAW.search(log.text())
    log._clean()
    cleaned = path.read_text(encoding="utf-8")
    assert not _RAW.search(cleaned)
    assert "green\nbar 1%\nbar 2%\n" in cleaned


def _evil_folder(root: Path) -> Path:
    """Two classes of evil names, with a broken image of an evil name in each."""
    for number, label in enumerate(("\x1b[31mred\n", "[bold]\u202e")):
        folder = root / f"{number}{label}"
        folder.mkdir(parents=True)
        for at in range(4):
            (folder / f"{at}\x1b]0;t\x07\n.png").write_bytes(PNG)
        with open(os.fsencode(folder) + b"/\xff\x1b\nbad.png", "wb") as file:
            file.write(b"no image")
    return root


def test_a_source_of_evil_names_is_prepared_and_told(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _evil_folder(tmp_path / "data")
    source = image_source(SourceConfig(path=str(root)), Printed("source"))
    told = CollectedWarnings()
    out = ArtifactWriter(Folder.at(tmp_path / "out"), "images", "f" * 64)
    artifact = STAGE.execute(PreprocessConfig(image_size=32, max_bad_fraction=0.5), {"source": source}, out, told)
    assert (artifact.counts["images"], artifact.counts["quarantined"]) == (8, 2)
    assert artifact.read_json("classes.json") == ["0\x1b[31mred\n", "1[bold]\u202e"], "records hold names as they are"
    terminal = Terminal()
    for warning in told.warnings:
        terminal.warn(warning)
        assert "\n.png" not in warning
        assert "\nbad" not in warning
    done = capsys.readouterr()
    assert "\\x1b[31mred\\n" in done.out
    assert not _RAW.search(done.out + done.err)


def test_an_error_that_lists_evil_names_is_one_message(tmp_path: Path) -> None:
    root = _evil_folder(tmp_path / "data")
    done = edt("preprocess", str(root), str(tmp_path / "out"), "--max-bad-fraction", "0", "--kind", "labels")
    assert done.returncode == 2
    assert not _RAW.search(done.stdout + done.stderr)
    done = edt("init", "--images", str(root), "--out", str(tmp_path / "edt.yaml"), "--yes")
    assert not _RAW.search(done.stdout + done.stderr)
    assert "bug in this program" not in done.stderr
