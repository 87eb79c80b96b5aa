"""Progress across processes: nothing that was handed over is lost, and whoever asks to stop is heard."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edt_core.errors import Stopped, UserError
from edt_core.progress import Printed
from jobs.runtime import board as board_module
from jobs.runtime.board import Board, BoardProgress, Kept, Measured, Picture, Warned
from jobs.runtime.cluster import cause_of
from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import STOPPING, Bar, Interrupts
from tests.support.processes import wait_for


def test_reports_wait_in_order_until_they_are_delivered() -> None:
    board = Board()
    reports = [Measured({"loss": float(i)}, i, i) for i in range(450)]
    for report in reports:
        board.report("train", report)
    taken: list[Any] = []
    parcel: list[Any] = []
    while parcel := board.waiting("train", len(parcel)):
        taken += parcel
    assert taken == reports
    assert board.waiting("train", 0) == []


def test_what_is_not_confirmed_is_handed_out_again() -> None:
    board = Board()
    board.report("train", Measured({"loss": 1.0}, 1, 1))
    assert board.waiting("train", 0) == board.waiting("train", 0) != []
    assert board.waiting("sample", 0) == []


def test_without_a_record_nothing_is_kept() -> None:
    board = Board(recorded=False)
    board.report("train", Measured({"loss": 1.0}, 1, 1))
    board.warn("train", "careful")
    assert board.waiting("train", 0) == []
    assert board.read()[1] == [("train", "careful")]


def test_a_detail_that_changes_begins_no_phase(capsys: pytest.CaptureFixture[str]) -> None:
    printed = Printed("train", interval_s=0)
    for step in (1, 2, 3):
        printed.update(step, 10, "steps", detail=f"loss {1 / step:.3f}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].endswith("loss 0.333")
    assert "3/10 steps, 0.0/s" not in lines[-1]  # a new phase would have no rate yet
    board = Board()
    for step in (1, 2):
        board.update("train", step, 10, "steps", None, f"loss {step}")
    assert board.read()[0]["train"] == (2, 10, "steps", "loss 2")


def test_a_bar_goes_on_when_the_detail_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = Bar("train")
    tasks = set()
    for step in (1, 2, 3):
        bar.update(step, 10, "steps", detail=f"loss {step}")
        tasks |= set(bar._bars.task_ids)
    assert len(tasks) == 1
    assert "loss 3" in bar._bars.tasks[0].fields["rate"]


@pytest.fixture
def board(ray_session: None) -> Iterator[Any]:
    import ray

    actor = ray.remote(Board).options(num_cpus=0).remote()
    ray.get(actor.read.remote())  # a worker does not wait for long, and on a busy machine a board starts slowly
    yield actor
    ray.kill(actor)


@pytest.mark.ray
def test_a_worker_that_is_lost_loses_nothing_that_it_handed_over(board: Any) -> None:
    import ray

    @ray.remote(max_retries=0)
    def doomed(progress: BoardProgress) -> None:
        for step in range(1, 21):
            progress.metrics({"loss": 1 / step}, step)
        progress.image("samples", b"png", 20)
        progress.checkpoints({20: ("uri", "digest")})
        os._exit(1)

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(doomed.remote(BoardProgress("train", board)))
    progress = BoardProgress("train", board)
    progress.warn("again")
    reports = ray.get(board.waiting.remote("train", 0))
    assert [report.step for report in reports[:20]] == list(range(1, 21))
    assert all(abs(report.time_ms / 1000 - time.time()) < 120 for report in reports[:20])
    assert [type(report) for report in reports[20:]] == [Picture, Kept, Warned]


@pytest.mark.ray
def test_a_task_that_polls_hears_that_it_is_to_stop(board: Any) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def listens(progress: BoardProgress) -> None:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            if progress.stopping():
                raise Stopped("stopped")
            time.sleep(0.01)

    ref = listens.remote(BoardProgress("train", board))
    wait_for(lambda: "train" in ray.get(board.read.remote())[2])
    board.ask_to_stop.remote()
    with pytest.raises(Stopped) as caught:
        ray.get(ref)
    assert type(cause_of(caught.value)) is Stopped


def test_to_ask_the_board_is_never_to_wait_for_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked: list[str] = []

    class Stub:
        class stopping:  # noqa: N801  stands where an actor's method does
            remote = staticmethod(asked.append)

    def wait(references: list[Any], timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        assert timeout == 0
        return [], references

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda reference: pytest.fail("it waits"))
    monkeypatch.setattr(board_module, "_INTERVAL_S", 0.0)
    progress = BoardProgress("train", Stub)
    assert not any(progress.stopping() for _ in range(3))
    assert asked


@pytest.mark.ray
def test_nobody_is_stopped_by_a_board_that_is_gone(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(board_module, "_INTERVAL_S", 0.0)  # every call asks anew
    board = ray.remote(Board).options(num_cpus=0).remote()
    progress = BoardProgress("train", board)
    assert not progress.stopping()
    assert progress.__getstate__()["_query"] is None  # which is of this process, and does not travel
    ray.kill(board)
    for _ in range(5):
        if progress._query is not None:
            ray.wait([progress._query])  # that nobody will answer
        assert not progress.stopping()
    progress.metrics({"loss": 1.0}, 1)


def test_the_first_interrupt_asks_those_who_listen_and_the_second_ends() -> None:
    told: list[str] = []

    class Stub:
        class ask_to_stop:  # noqa: N801  stands where an actor's method does
            remote = staticmethod(lambda: told.append("stop"))

    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    with interrupts.handled():
        interrupts.heard_by(["train"])
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        assert [interrupts.passed_on(Stub) for _ in range(2)] == [True, False]
        assert told == ["stop"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_nobody_hears_is_one_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts().handled():
        signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with Interrupts().handled():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(("error", "code"), [(Stopped("stopped at step 5"), 130), (UserError("no"), 2)])
def test_what_a_verb_exits_with(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, exit_code():
        raise error
    assert left.value.code == code
    assert str(error) in capsys.readouterr().err


class Failed(Exception):  # noqa: N818  stands where Ray Train's WorkerGroupError does
    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("workers failed")
        self.worker_failures = failures


def test_of_several_workers_errors_the_one_that_tells_is_the_cause() -> None:
    stopped = Stopped("stopped at step 5")
    stopped.__cause__ = OSError("inner")
    assert cause_of(Failed({0: RuntimeError("connection closed"), 1: stopped})) is stopped
    lost = RuntimeError("connection closed")
    assert cause_of(Failed({0: lost, 1: OSError()})) is lost


STOPPABLE = """
import sys, time
import ray
from edt_core.errors import Stopped
from edt_core.progress import Silent
from jobs.runtime import progress
from jobs.runtime.cluster import connect
from jobs.runtime.exit_code import exit_code

class Watched(progress.Interrupts):
    def heard_by(self, steps):
        super().heard_by(steps)
        if steps:
            open(f"{folder}/heard-{listens}", "w").close()

@ray.remote(num_cpus=0)
def work(progress, listens, folder):
    open(f"{folder}/began-{listens}", "w").close()
    while True:
        if listens != "never" and progress.stopping():
            while listens == "slowly":
                time.sleep(0.01)
            raise Stopped("stopped at step 7, a checkpoint is written")
        time.sleep(0.01)

progress.Interrupts = Watched
folder = sys.argv[1]
for listens in sys.argv[2:]:
    try:
        with exit_code():
            connect(min_cpus=2)
            with progress.relayed("train", Silent()) as relayed:
                ray.get(work.remote(relayed, listens, folder))
    except SystemExit as ended:
        code = ended.code
        print(f"{listens} ended with {code}", file=sys.stderr, flush=True)
sys.exit(code)
"""


@pytest.mark.ray
def test_ctrl_c_in_the_terminal_of_a_verb(tmp_path: Path) -> None:
    """Of work that listens, of work that does not, and twice of work that is slow to stop: verbs of one session.

    Before these, SIGTERM, which Ray takes for itself as a session starts.
    """
    command = [sys.executable, "-c", STOPPABLE, str(tmp_path), "terminated", "soon", "never", "slowly"]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
    said = (tmp_path / "errors").read_text

    def interrupt_after(ready: Callable[[], bool]) -> None:
        wait_for(lambda: ready() or process.poll() is not None)
        assert process.poll() is None, said()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too

    try:
        wait_for(lambda: (tmp_path / "heard-terminated").exists() or process.poll() is not None)
        process.terminate()
        interrupt_after((tmp_path / "heard-soon").exists)
        interrupt_after((tmp_path / "began-never").exists)
        interrupt_after((tmp_path / "heard-slowly").exists)
        interrupt_after(lambda: STOPPING in said().partition("never ended with 130")[2])
        assert process.wait(240) == 130, said()
    finally:
        process.kill()
    terminated, soon = said().split("terminated ended with 130")
    assert "stopped at step 7" in terminated
    assert STOPPING in terminated
    soon, slowly = soon.split("soon ended with 130")
    never, slowly = slowly.split("never ended with 130")
    assert "stopped at step 7" in soon
    assert all("erun the same command to resume" in text for text in (never, slowly))
    assert [STOPPING in text for text in (soon, never, slowly)] == [True, False, True]
    assert "slowly ended with 130" in slowly
