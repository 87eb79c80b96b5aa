"""`edt run` on a terminal of its own: the tree while it runs, Ctrl-C, and how to go on."""

import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from pipelines.outcome import Outcome
from tests.support.small import EDT, copy_store, edt, environment, options

OPTIONS = options("train.max_steps=5000", "train.checkpoint_every=5000")
TRAINS = re.compile(r"▸ train edt-tiny-digits-32 +running +[━─]* *[1-9]\d*/5000 steps")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def read_until(terminal: int, wanted: re.Pattern[str] | None) -> str:
    """What appears on a terminal until the text is there; with None, until its program has gone."""
    seen = b""
    while True:
        try:
            more = os.read(terminal, 1 << 16)
        except OSError:  # Linux tells the end of the other side so
            more = b""
        seen += more
        text = ESCAPES.sub("", seen.decode(errors="replace"))
        if not more or (wanted is not None and wanted.search(text)):
            return text


def of_a_person() -> None:
    """Make the terminal that of this process, and Ctrl-C what it is there: it is ignored by what runs unattended."""
    ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.ray
@pytest.mark.extern
def test_ctrl_c_on_a_terminal_leaves_a_training_that_goes_on(first: Outcome, store: Path, tmp_path: Path) -> None:
    """In a store with another run's artifacts, so that it trains at once."""
    copy_store(store, tmp_path / "store")
    arguments = ["--store", str(tmp_path / "store"), *OPTIONS]
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 240, 0, 0))
    process = subprocess.Popen(
        [*EDT, "run", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="xterm-256color", LANG="C.UTF-8"),
        start_new_session=True,
        preexec_fn=of_a_person,
    )
    os.close(theirs)
    shown = read_until(ours, TRAINS)
    os.write(ours, b"\x03")
    shown += read_until(ours, None)
    os.close(ours)
    assert process.wait() == 130
    assert "= preprocess" in shown
    assert "· evaluate" in shown
    assert re.search(r"log  \S+/store/logs/run-\S+\.log", shown)
    assert "training writes a checkpoint first" in shown
    assert re.search(r"train edt-tiny-digits-32 +stopped +stopped at step [1-9]", shown)
    told = " ".join(shown.partition("To resume:")[2].split())
    assert shlex.join(["edt", "run", *arguments[:2]]) in told
    assert not re.search(r"Traceback|raylet|\(\w+ pid=", shown)
    plan = edt("plan", *arguments)
    assert plan.returncode == 0, plan.stderr
    assert re.search(r"^resume +train edt-tiny-digits-32", plan.stdout, re.MULTILINE)
    assert re.search(r"^reuse +encode", plan.stdout, re.MULTILINE)
