"""What a person sees of a run: the tree on a terminal, lines elsewhere, and a log with everything else."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edt_core.errors import UserError
from edt_core.evaluation.worth import Remark
from jobs.runtime.board import Board, Shown
from pipelines.commands.workflow import show_outcome
from pipelines.outcome import Outcome
from pipelines.registry.gate import Decision
from pipelines.terminal.run_log import RunLog
from pipelines.terminal.step_tree import StepTree, clock
from pipelines.terminal.terminal import Terminal
from tests.support.small import edt

CALLS = (
    ("preprocess", ("source",)),
    ("autoencoder", ("preprocess",)),
    ("encode", ("preprocess", "autoencoder")),
    ("classifier", ("preprocess",)),
    ("train edt-s", ("encode",)),
    ("sample edt-s", ("train edt-s", "autoencoder", "classifier")),
    ("train edt-b", ("encode",)),
)


def called() -> StepTree:
    tree = StepTree()
    for name, needs in CALLS:
        tree.add(name, needs)
    return tree


def drawn(tree: StepTree, width: int = 100, room: int = 50, unicode: bool = True) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    console.print(tree.render(width, room, unicode))
    return console.file.getvalue()  # type: ignore[attr-defined]


def terminal_of(width: int, height: int = 40) -> tuple[Terminal, io.StringIO]:
    """A terminal that is a text."""
    from rich.console import Console

    terminal, screen = Terminal(), io.StringIO()
    terminal.console = Console(
        file=screen, force_terminal=True, color_system=None, highlight=False, width=width, height=height, soft_wrap=True
    )
    return terminal, screen


def test_a_step_stands_beneath_the_deepest_that_it_needs_and_leaves_out_what_that_says() -> None:
    shown = [(guides, node.label) for guides, node in called().lines(50)]
    assert shown == [
        ("", "preprocess"),
        ("├ ", "autoencoder"),
        ("│ └ ", "encode"),
        ("│   ├ ", "train edt-s"),
        ("│   │ └ ", "sample"),
        ("│   └ ", "train edt-b"),
        ("└ ", "classifier"),
    ]


def test_each_state_has_its_word_mark_and_note() -> None:
    tree = called()
    tree.get("preprocess").state, tree.get("preprocess").note = "reused", "0123456789ab"
    tree.get("autoencoder").state, tree.get("autoencoder").note = "failed", "OSError: the disk is full"
    tree.get("classifier").count(Shown(3, 20, "steps", "loss 2.2"))
    text = drawn(tree)
    lines = {line.split()[-2 if "waiting" not in line else -1]: line for line in text.splitlines()}
    assert "= preprocess" in text
    assert "reused   0123456789ab" in text
    assert "✗ autoencoder" in text
    assert "OSError: the disk is full" in text
    assert "━━────────────" in text
    assert "3/20 steps, loss 2.2" in text
    assert len(lines) >= 3
    assert tree.tally() == "1 of 7 steps done, 1 reused, 1 running, 1 failed"


@pytest.mark.parametrize("width", [40, 60, 80, 99, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    tree = called()
    for name, _ in CALLS:
        tree.get(name).count(Shown(123456, 1281167, "images in a long phase", "and a word on it " * 5))
    assert all(len(line) <= width for line in drawn(tree, width).splitlines())


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_names_and_states_are_whole_on_every_terminal_and_only_details_are_left_out(width: int) -> None:
    tree, model = StepTree(), "edt-tiny-digits-32"
    calls = [(f"{before}{verb} {model}", verb) for before in ("", "untrained ") for verb in ("train", "sample")]
    for name, verb in (("encode", ""), *calls):
        needs = ("encode",) if verb == "train" else (name.replace("sample", "train"),)
        tree.add(name, needs if verb else ())
    tree.get(f"train {model}").count(Shown(1340, 5000, "steps", "loss 0.432, " + "more of it, " * 20))
    tree.get(f"untrained train {model}").state = "failed"
    tree.get(f"untrained train {model}").note = "OSError: the disk is full, and there is no room " * 5
    lines = drawn(tree, width).splitlines()
    words = [line.strip(" ├└│·▸✗").split() for line in lines]
    assert [line[:3] for line in words] == [
        ["encode", "waiting"],
        ["train", model, "running"],
        ["sample", "waiting"],
        ["untrained", "train", model][:3],
        ["sample", "waiting"],
    ]
    assert words[3][3] == "failed"
    assert "1340/5000 steps" in lines[1]
    assert not lines[1].endswith("…")  # parts are left out whole
    assert lines[3].endswith("…")
    if width >= 80:
        states = ("waiting", "running", "failed")
        assert len({line.index(state) for line in lines for state in states if state in line}) == 1


def test_without_room_for_a_name_its_end_is_left_out_and_its_state_stays() -> None:
    tree = called()
    tree.get("train edt-s").state = "failed"
    for unicode in (True, False):
        lines = drawn(tree, 18, unicode=unicode).splitlines()
        assert [line.split()[-1] for line in lines] == ["waiting"] * 3 + ["failed"] + ["waiting"] * 3
        assert all(len(line) <= 18 for line in lines)
    assert "~" in "".join(lines)
    "".join(lines).encode("ascii")


def test_where_there_is_no_room_what_ended_goes_first_and_what_runs_stays() -> None:
    tree = called()
    for name in ("preprocess", "autoencoder", "encode"):
        tree.get(name).state = "done"
    tree.get("train edt-s").count(Shown(1, 2, "steps"))
    assert len(list(tree.lines(7))) == 7
    assert [node.name for _, node in tree.lines(6)] == ["train edt-s", "sample edt-s", "train edt-b", "classifier"]
    assert [node.name for _, node in tree.lines(2)] == ["train edt-s"]


def test_a_terminal_without_unicode_gets_plain_characters() -> None:
    tree = called()
    tree.get("preprocess").state = "done"
    tree.get("encode").count(Shown(1, 2, "shards"))
    drawn(tree, unicode=False).encode("ascii")


def test_a_detail_that_changes_begins_no_phase_and_a_new_unit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    node = StepTree().add("train")
    for done in (5000, 5010):  # resumed at 5,000: what was there is no speed
        node.count(Shown(done, 6000, "steps", f"loss {done}"))
        now[0] += 10
    assert node.progress() == "5010/6000 steps, 0.5/s, 33:00 left, loss 5010"
    node.count(Shown(1, 9, "images"))
    assert node.progress() == "1/9 images"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (68, "1:08"), (7400, "2:03:20")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_tree_stays_when_the_run_is_over_and_markup_in_messages_is_text() -> None:
    terminal, screen = terminal_of(100)
    with terminal:
        terminal.called("preprocess", ())
        terminal.called("train edt-s", ("preprocess",))
        terminal.reused("preprocess", "0" * 64)
        board = Board()
        board.update("train edt-s", 2, 10, "steps", None, "loss [2]")
        board.warn("train edt-s", "step 1 was [skipped]")
        terminal.show(*board.read()[:2])
        terminal.show(*board.read()[:2])
        terminal.failed("train edt-s", ValueError("a [bad] value\nand more"))
    text = screen.getvalue()
    assert text.count("step 1 was [skipped]") == 1  # a warning is said once
    last = text.rsplit("preprocess", 1)[1]
    assert "ValueError: a [bad] value" in last
    assert "and more" not in last
    assert "1 of 2 steps done, 1 reused, 1 failed" in last
    terminal.called("late", ())
    assert "late" not in screen.getvalue().rsplit("1 failed", 1)[1]


def test_the_end_of_a_run_says_what_it_is_worth_and_what_was_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    decision = Decision("edt-s", "1", "fd_classifier", 46.7, None, None, became_champion=True)
    outcome = Outcome("0" * 32, "sqlite:///x", reused=2, executed=11)
    outcome.decisions["edt-s"] = decision
    outcome.metrics["edt-s"] = ({"fd_classifier": 47.5}, {"fd_classifier": 46.7})
    outcome.remarks["edt-s"] = (Remark("nearly the same", doubt=True), Remark("a fact"))
    outcome.left_out = ("13 files that are not images: 13 .txt", "1 of 3 classes, which have no images: bee")
    with Terminal() as terminal:
        show_outcome(outcome, terminal)
    assert capsys.readouterr().out.splitlines()[:8] == [
        "",
        "2 steps reused, 11 run, 0 failed in 0 s",
        "not used  13 files that are not images: 13 .txt",
        "not used  1 of 3 classes, which have no images: bee",
        "",
        "edt-s version 1  first champion: fd_classifier 46.7",
        "  fd_classifier              46.7   untrained 47.5",
        "  nearly the same",
    ]
    told = outcome.to_dict()
    assert told["left_out"] == list(outcome.left_out)
    assert told["models"]["edt-s"]["remarks"] == ["nearly the same", "a fact"]


def test_a_step_that_another_run_makes_waits_for_it_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    board, terminal = Board(), Terminal()
    terminal.called("encode", ())
    board.made_by("encode", "run 0123456789ab")
    for _ in range(2):
        terminal.show(*board.read()[:2])
        terminal.made_elsewhere(board.made_elsewhere())
    node = terminal.tree.get("encode")
    assert (node.state, node.note) == ("waiting", "being made by run 0123456789ab")
    assert "waiting  being made by run 0123456789ab" in drawn(terminal.tree)
    assert board.made_elsewhere(finished=True) == {}
    board.made_by("encode", "")  # the other one stopped
    board.update("encode", 1, 3, "shards", None)
    terminal.show(*board.read()[:2])
    assert (node.state, board.made_elsewhere()) == ("running", {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["waiting", "encode", *["being", "made", "by", "run", "0123456789ab"]],
        ["running", "encode", "1/3", "shards"],
    ]


def test_listing_the_images_is_no_step_and_no_steps_are_not_counted() -> None:
    terminal, screen = terminal_of(80)
    for done in (1, 2):
        terminal.source_progress().update(done, 2, "folders listed")
        terminal.freeze()
        terminal.console.print(terminal._rendered())
    assert "▸ source" in screen.getvalue()
    assert "steps done" not in screen.getvalue()
    terminal.tree.add("preprocess", ("source",))
    assert terminal.tree.tally() == "0 of 1 steps done"


def test_without_a_terminal_there_is_a_line_at_each_turn(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    with terminal:
        for done in (1, 2):
            terminal.source_progress().update(done, 2, "folders listed")  # over in no time, and no step
        terminal.called("encode", ())
        for done in (1, 2, 3):
            terminal.show({"encode": Shown(done, 3, "shards")}, [])
        terminal.finished("encode", 1.5, "1" * 64)
        terminal.called("evaluate", ("encode",))
        terminal.finished("evaluate", 75.0, "2" * 64, "fid 12.3")
        terminal.stopped("later", "asked to\nstop")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["running", "encode", "1/3", "shards"],
        ["done", "encode", "1" * 12, "1.5", "s"],
        ["done", "evaluate", "2" * 12, "75.0", "s", "fid", "12.3"],
        ["stopped", "later", "asked", "to"],
    ]


CHATTER = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from pipelines.commands.workflow import show_outcome
from pipelines.outcome import Outcome
from pipelines.terminal.run_log import RunLog
from pipelines.terminal.terminal import Terminal
with RunLog.new(sys.argv[1], "run", to_stderr="err" in sys.argv) as log, Terminal("err" in sys.argv, log) as terminal:
    print("printed by Python")
    os.write(1, b"written by C to 1\\n")
    os.write(2, b"written by C to 2\\n")
    subprocess.run(["echo", "echoed by a child"])
    warnings.warn("a library warns")
    logging.getLogger("mlflow").warning("mlflow talks")
    [print("\\x1b[36magain\\x1b[0m") for _ in range(1000)]
    print("https://me:hunter2secret@host/x and " + os.environ["MY_TOKEN"])
    terminal.say("for the person")
    try:
        raise ValueError("why")
    except ValueError as error:
        terminal.failed("train", error)
print("after")
print(log.path)
"""


@pytest.mark.extern
@pytest.mark.parametrize("stream", ["out", "err"])
def test_all_that_others_print_goes_into_the_log_and_no_secret_stays_there(stream: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHATTER, str(tmp_path / "store"), stream],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MY_TOKEN": "abcdefgh12345"},
    )
    view = done.stderr if stream == "err" else done.stdout
    assert view.splitlines()[0] == "for the person"
    assert "ValueError: why" in view
    assert "Traceback" not in done.stdout + done.stderr
    path = Path(done.stdout.splitlines()[-1])
    assert done.stdout.splitlines()[-2] == "after"
    assert path.parent == tmp_path / "store" / "logs"
    assert path.stat().st_mode & 0o077 == 0
    log = path.read_text()
    for said in ("printed by Python", "by C to 1", "by C to 2", "by a child", "a library warns", "mlflow talks"):
        assert said in log
        assert said not in done.stdout + done.stderr
    assert "for the person" in log
    assert log.count("again") == 1
    assert "again [1000 times]\n" in log
    assert "Traceback" in log
    assert "hunter2secret" not in log
    assert "abcdefgh12345" not in log


def test_a_log_that_nothing_was_said_in_is_not_left_behind(tmp_path: Path) -> None:
    with RunLog.new(str(tmp_path), "run") as log:
        assert log.path.exists()
    assert not log.path.exists()


@pytest.mark.parametrize("store", ["s3://bucket/store", "{file}"])
def test_a_store_that_takes_no_log_leaves_it_with_the_temporary_files(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").write_text("no folder")
    log = RunLog.new(store.format(file=tmp_path / "file"), "run")
    assert log.path.parent == tmp_path / f"edt-logs-{os.getuid()}"


def test_a_view_that_is_not_that_of_the_process_is_left_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen: Any = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    with RunLog.new(str(tmp_path), "run") as log, Terminal(log=log) as terminal:
        terminal.say("shown")
    assert screen.getvalue() == "shown\n"


def test_the_end_of_a_run_counts_skipped_steps(capsys: pytest.CaptureFixture[str]) -> None:
    left_out = {"found": 404, "quarantined": 1, "quarantined_images": [{"path": "cat/0100.jpg", "reason": "truncated"}]}
    failures: dict[str, BaseException] = {"encode": RuntimeError("why")}
    outcome = Outcome("0" * 32, "", failures=failures, executed=1, skipped=9, images={"images": 403, **left_out})
    show_outcome(outcome, Terminal())
    told = capsys.readouterr().out
    assert "0 steps reused, 1 run, 1 failed, 9 skipped in 0 s" in told
    assert (outcome.to_dict()["skipped"], outcome.to_dict()["unreadable_images"]) == (9, 1)
    show_outcome(Outcome("0" * 32, ""), Terminal())
    told = capsys.readouterr().out
    assert "0 steps reused, 0 run, 0 failed in 0 s" in told
    assert "not used" not in told


def test_an_unknown_option_or_a_user_error_is_no_traceback() -> None:
    for arguments in (["run", "--nonsense"], ["nonsense"], ["run", "no-such-configuration"]):
        done = edt(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    assert issubclass(UserError, Exception)


def test_a_disk_that_is_full_costs_the_log_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written to /dev/full, where every write fails for want of space."""
    log = RunLog.new(str(tmp_path), "run")
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with log, Terminal(log=log) as terminal:
        terminal.say("for the person")
        terminal.failed("train", ValueError("why"))
    assert "for the person" in capsys.readouterr().out


def test_a_log_that_cannot_be_cleaned_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with RunLog.new(str(tmp_path), "run") as log:
        log.write("said")
        os.write(2, b"\x1b[31mred\x1b[0m\n")
        monkeypatch.setattr(Path, "write_text", full)
    assert log.path.read_bytes() == b"said\n\x1b[31mred\x1b[0m\n"
    assert [path.name for path in log.path.parent.iterdir()] == [log.path.name]
