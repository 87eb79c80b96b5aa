"""A lease has one holder, whatever dies, stalls or is paused, on a disk and in an object store."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edt_core.store.folder import Folder
from pipelines.schedule import lease as leases
from pipelines.schedule.lease import Taken, hold, this_process
from tests.support.processes import wait_for

BEAT_S = 0.25

FOR_EVER = 100_000  # looks at a holder that lives: however slowly it beats, it does not count as dead

# Holds until its standard input is closed.
HOLDER = """
import sys, threading, time
from edt_core.store.folder import Folder
from pipelines.schedule import lease as leases
from pipelines.schedule.lease import Taken, this_process, hold
uri, every_s = sys.argv[1], float(sys.argv[2])
leases._LOOKS = leases._TRIES = int(sys.argv[3])
try:
    lease = hold(Folder.at(uri), "run", this_process(), every_s)
except Taken as taken:
    print("taken", taken.owner["pid"], flush=True)
    sys.exit()
print("held", lease.generation, flush=True)
told = threading.Thread(target=sys.stdin.read, daemon=True)
told.start()
while told.is_alive() and not lease.lost:
    time.sleep(0.02)
print("lost" if lease.lost else "kept", flush=True)
lease.release()
"""


@pytest.fixture
def local(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "store")


def start(store: Folder) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, store.uri, str(BEAT_S), str(FOR_EVER)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def holder(store: Folder) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease; killed at the end if it still lives."""
    process = start(store)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("held")
        yield process
    finally:
        process.kill()
        process.communicate()


def owner_of(store: Folder) -> dict[str, Any]:
    """What the living holder of the lease says of itself to one that wants it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "_LOOKS", FOR_EVER)
        with pytest.raises(Taken) as taken:
            hold(store, "run", this_process(), BEAT_S)
    return taken.value.owner


def generations(store: Folder) -> list[str]:
    return [name for name in store.child(".leases/run").names() if name.endswith(".json")]


def one_of_many_holds(store: Folder, count: int) -> None:
    """All start at once, and the one that holds does so until all others have been told."""
    processes = [start(store) for _ in range(count)]
    try:
        told = [process.stdout.readline().split() for process in processes if process.stdout is not None]
        (winner,) = (number for number, words in enumerate(told) if words[0] == "held")
        pid = str(processes[winner].pid)
        assert [words for words in told if words is not told[winner]] == [["taken", pid]] * (count - 1)
        assert processes[winner].communicate()[0].split() == ["kept"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


MANY = [3, pytest.param(8, marks=pytest.mark.slow)]


@pytest.mark.extern
@pytest.mark.parametrize("count", MANY)
def test_of_many_processes_one_holds(local: Folder, count: int) -> None:
    one_of_many_holds(local, count)


def test_a_holder_that_has_not_yet_written_is_waited_for(local: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its lock and its first record a holder has no name yet; who comes then learns it all the same."""
    folder = local.child(".leases/run")
    guard = leases._guard(folder)
    assert guard is not None
    record = json.dumps({"owner": this_process(), "released": False}).encode()
    # It writes while the other waits.
    monkeypatch.setattr(time, "sleep", lambda seconds: folder.write_bytes("0000000001.json", record))
    assert owner_of(local)["pid"] == os.getpid()
    guard.release()


@pytest.mark.extern
@pytest.mark.parametrize("count", MANY)
def test_of_many_processes_one_holds_in_an_object_store(s3: str, count: int) -> None:
    one_of_many_holds(Folder.at(s3), count)


def test_of_many_threads_one_holds_each_generation(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock of the operating system helps here: release and take, over and over, without ever two at once."""
    monkeypatch.setattr(leases, "_LOOKS", FOR_EVER)  # all of them live
    store, inside, most, took = Folder.at(s3), [], [0], []

    def contend() -> None:
        for _ in range(6):
            try:
                with hold(store, "run", this_process(), 0.05) as lease:
                    inside.append(lease)
                    most[0] = max(most[0], len(inside))
                    took.append(lease.generation)
                    time.sleep(0.02)
                    inside.remove(lease)
            except Taken:
                time.sleep(0.02)

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert len(took) == len(set(took)) > 1
    assert len(generations(store)) == 1, "old generations pile up"


def test_who_holds_is_told_and_a_release_is_seen_at_once(local: Folder) -> None:
    with hold(local, "run", {"host": "here", "pid": 7, "since": "then"}):
        with pytest.raises(Taken, match="process 7 on here, since then"):
            hold(local, "run", this_process())
        hold(local, "another/name", this_process()).release()
    lease = hold(local, "run", this_process())
    assert lease.generation == 2
    lease.release()
    assert len(generations(local)) == 1


@pytest.mark.faults
def test_a_killed_holder_is_replaced_at_once_on_a_disk(local: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(local) as process:
        process.kill()
        process.wait()
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
        hold(local, "run", this_process()).release()


@pytest.mark.faults
def test_a_killed_holder_is_outwaited_in_an_object_store(s3: str) -> None:
    store = Folder.at(s3)
    with holder(store) as process:
        assert owner_of(store)["pid"] == process.pid
        process.kill()
        process.wait()
        lease = hold(store, "run", this_process(), BEAT_S)
        assert lease.generation == 2
        lease.release()


@pytest.mark.faults
def test_a_holder_under_another_kernel_is_told_by_its_beats(local: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk whose locks are not shared: the lock is free for us, and the holder lives."""
    with holder(local) as process:
        monkeypatch.setattr(leases, "_kernel", lambda: "another")
        monkeypatch.setattr(leases, "_guard", lambda folder: None)
        assert owner_of(local)["pid"] == process.pid
        process.kill()
        process.wait()
        hold(local, "run", this_process(), BEAT_S).release()


@pytest.mark.faults
def test_a_paused_holder_that_wakes_up_learns_that_it_lost(s3: str) -> None:
    store = Folder.at(s3)
    with holder(store) as process:
        process.send_signal(signal.SIGSTOP)
        lease = hold(store, "run", this_process(), BEAT_S)
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.readline() == "lost\n"
        process.wait()
        assert not lease.lost
        wait_for(lambda: generations(store) == ["0000000002.json"])
        lease.release()


@pytest.mark.faults
def test_a_holder_learns_of_a_successor_that_is_gone_already(s3: str) -> None:
    """The successor's file stays when it releases: the highest generation never goes down."""
    store = Folder.at(s3)
    with holder(store) as process:
        process.send_signal(signal.SIGSTOP)
        hold(store, "run", this_process(), BEAT_S).release()
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.readline() == "lost\n"


def test_a_taker_that_stalls_between_look_and_write_withdraws(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take the next generations and sweep the one that it then creates."""
    store = Folder.at(s3)
    hold(store, "run", this_process(), BEAT_S).release()
    write, stalled = Folder.write_bytes, []

    def stalls(folder: Folder, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        if exclusive and not stalled:
            stalled.append(name)
            hold(store, "run", this_process(), BEAT_S).release()
            stalled.append(hold(store, "run", {"pid": 5}, BEAT_S))
        return write(folder, name, data, exclusive=exclusive)

    monkeypatch.setattr(Folder, "write_bytes", stalls)
    monkeypatch.setattr(leases, "_LOOKS", FOR_EVER)
    with pytest.raises(Taken, match="process 5 "):
        hold(store, "run", this_process(), BEAT_S)
    name, third = stalled
    assert (name, third.generation) == ("0000000002.json", 3)
    assert generations(store) == ["0000000003.json"]
    assert not third.lost
    third.release()


def test_the_loser_is_called(s3: str) -> None:
    store, called = Folder.at(s3), threading.Event()
    lease = hold(store, "run", this_process(), BEAT_S, on_lost=called.set)
    store.child(".leases/run").write_bytes(f"{lease.generation + 1:010d}.json", b"{}")
    assert called.wait(240)
    assert lease.lost
    lease.release()
    assert generations(store) == ["0000000002.json"]


@pytest.mark.faults
def test_no_clock_of_the_wall_decides(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps back a day: the holder lives; another day: it is dead, and that is known."""
    store = Folder.at(s3)
    with holder(store) as process:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() - 86400)
        assert owner_of(store)["pid"] == process.pid
        process.kill()
        process.wait()
        monkeypatch.setattr(time, "time", lambda: real() - 2 * 86400)
        hold(store, "run", this_process(), BEAT_S).release()


@pytest.mark.extern
def test_old_times_of_files_do_not_make_a_holder_dead(local: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(local) as process:
        for path in Path(local.uri).rglob("*"):
            os.utime(path, (0, 0))
        monkeypatch.setattr(leases, "_kernel", lambda: "another")
        monkeypatch.setattr(leases, "_guard", lambda folder: None)
        assert owner_of(local)["pid"] == process.pid


def test_a_store_that_is_away_for_some_beats_costs_nothing(local: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    write, refused = Folder.write_bytes, []

    def refuses(folder: Folder, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        if len(refused) < 3 and not exclusive:
            refused.append(name)
            raise OSError("away")
        return write(folder, name, data, exclusive=exclusive)

    monkeypatch.setattr(Folder, "write_bytes", refuses)
    with hold(local, "run", this_process(), 0.02) as lease:
        file = Path(local.uri) / ".leases" / "run" / "0000000001.json"
        wait_for(lambda: json.loads(file.read_text())["beat"] > 3)
        assert not lease.lost
    assert json.loads(file.read_text())["released"]
