"""Schedules: cron as cron reads it, what is due, and a server that is killed, stopped and started again."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from edt_core.errors import UserError
from pipelines.schedule import server as scheduler
from pipelines.schedule.cron import Cron, Due
from pipelines.schedule.lease import hold, this_process
from pipelines.schedule.record import OVERLAP, UNCHANGED, Schedules, State, Tick, new_schedule, run_lease
from pipelines.schedule.server import Server, command
from tests.support import small
from tests.support.processes import wait_for
from tests.support.registry import write_empty_mlflow

SUNDAY, DAY = datetime(2026, 3, 1, tzinfo=UTC), timedelta(days=1)
NAMES = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")

NOW, EVERY_MINUTE = SUNDAY + timedelta(hours=12, seconds=30), "* * * * *"
NEW_YEAR = "0 0 1 1 *"  # a tick that does not come again while a test runs

# A server whose runs are a process that does as it is told: the mechanics of a run without its minutes.
SERVER = """
import sys
from pipelines.schedule import server as scheduler
from pipelines.schedule.record import Schedules
scheduler.command = lambda schedule: [sys.executable, "-c", sys.argv[2]]
sys.exit(scheduler.Server(Schedules.at(sys.argv[1]), lambda text: print(text, flush=True), 0.1).serve())
"""
RUN = """
import pathlib, signal, sys, time
from pipelines.schedule.record import report_to_scheduler
here = pathlib.Path({here!r})
try:
    with (here / "started").open("a") as file:
        file.write("run\\n")
    while not (here / "go").exists():
        time.sleep(0.05)
except KeyboardInterrupt:
    report_to_scheduler("stopped", "run-id")
    sys.exit(130)
report_to_scheduler("finished", "run-id")
"""
# The same in a shell, which starts at once, for servers in the test's own process.
FINISHES = """echo run >> {here}/started; printf '{{"outcome": "finished", "run": "run-id"}}' > $EDT_SCHEDULE_RESULT"""
FAILS = "echo run >> {here}/started; echo 'error: the source is gone'; echo 'and more'; exit 2"


def ticks(expression: str, start: datetime, count: int, zone: str = "UTC") -> list[datetime]:
    cron, found = Cron(expression, zone), []
    for _ in range(count):
        start = cron.after(start)
        found.append(start)
    return found


@pytest.mark.parametrize(
    ("field", "days"),
    [
        ("0", "Sun"),
        ("7", "Sun"),
        ("1-5", "Mon Tue Wed Thu Fri"),
        ("5-7", "Fri Sat Sun"),
        ("*/2", "Sun Tue Thu Sat"),
        ("0-6", "Sun Mon Tue Wed Thu Fri Sat"),
        ("0-7/3", "Sun Wed Sat"),
        ("1,3,sat", "Mon Wed Sat"),
        ("mon-fri", "Mon Tue Wed Thu Fri"),
        ("mon-mon/2", "Mon"),
        ("Fri-Sun", "Fri Sat Sun"),
        ("sun-tue", "Sun Mon Tue"),
        ("*", "Sun Mon Tue Wed Thu Fri Sat"),
    ],
)
def test_weekdays_are_cron_s(field: str, days: str) -> None:
    fires = {tick.strftime("%a") for tick in ticks(f"0 3 * * {field}", SUNDAY, 14)}
    assert fires == set(days.split())


def test_every_set_of_weekdays_fires_on_these_and_no_others() -> None:
    for chosen in range(1, 128):
        days = [day for day in range(7) if chosen >> day & 1]
        fires = {tick.strftime("%a") for tick in ticks(f"0 3 * * {','.join(map(str, days))}", SUNDAY, 7)}
        assert fires == {NAMES[day] for day in days}


def test_either_day_field_is_enough_where_both_are_restricted() -> None:
    fires = ticks("0 0 15 * 1", SUNDAY, 6)
    assert [tick.day for tick in fires] == [2, 9, 15, 16, 23, 30]
    assert [tick.day for tick in ticks("0 0 15 * *", SUNDAY, 2)] == [15, 15]
    assert {tick.day % 2 for tick in ticks("0 0 */2 * 1", SUNDAY, 6)} == {1}  # a star: both must match
    assert {tick.strftime("%a") for tick in ticks("0 0 */2 * 1", SUNDAY, 6)} == {"Mon"}


@pytest.mark.parametrize(
    ("expression", "times"),
    [
        ("*/20 * * * *", ["00:20", "00:40", "01:00"]),
        ("5/25 0 * * *", ["00:05", "00:30", "00:55"]),
        ("10-30/10 0 * * *", ["00:10", "00:20", "00:30"]),
        ("@hourly", ["01:00", "02:00", "03:00"]),
    ],
)
def test_times_of_the_day(expression: str, times: list[str]) -> None:
    assert [tick.strftime("%H:%M") for tick in ticks(expression, SUNDAY, 3)] == times


def test_months_and_macros() -> None:
    assert [tick.month for tick in ticks("0 0 1 jan,jun-jul *", SUNDAY, 4)] == [6, 7, 1, 6]
    assert ticks("@weekly", SUNDAY, 1) == [SUNDAY + 7 * DAY]
    assert ticks("0 0 29 2 *", SUNDAY, 1)[0].year == 2028


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("0 3 * *", "has 4 fields"),
        ("", "has 0 fields"),
        ("0 3 * * * *", "has 6 fields"),
        ("60 3 * * 0", "minute '60'"),
        ("0 24 * * *", "hour '24'"),
        ("0 3 0 * *", "day of month '0'"),
        ("0 3 * 13 *", "month '13'"),
        ("0 3 * * 8", "day of week '8'"),
        ("0 3 * * -1", "day of week '-1'"),
        ("0 3 * * x", "names such as sun"),
        ("0 3 * janx *", "month 'janx'"),
        ("0 3 * * 5-1", "ascending"),
        ("*/0 3 * * *", "at least 1"),
        ("1,,2 3 * * *", "minute '1,,2'"),
        ("٣ 3 * * *", "minute"),
        ("0 0 30 2 *", "never matches"),
        ("0 0 31 4,6 *", "never matches"),
        ("0 0 */30 2 1L", "never matches"),
        ("1" * 5000 + " * * * *", "minute '11111"),
    ],
)
def test_expressions_that_cron_would_refuse(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Cron(expression, "UTC")


def test_a_time_zone_that_is_none() -> None:
    with pytest.raises(UserError, match="no time zone 'Mars/Base'"):
        Cron("0 3 * * *", "Mars/Base")
    with pytest.raises(UserError, match="no time zone"):
        Cron("0 3 * * *", "../../etc/passwd")


def test_a_fixed_time_comes_once_a_day_whatever_the_clocks_do() -> None:
    """02:30 does not exist on 29 March 2026 in Berlin, and exists twice on 25 October."""
    berlin = ZoneInfo("Europe/Berlin")
    for start in (datetime(2026, 3, 27, 12, tzinfo=berlin), datetime(2026, 10, 23, 12, tzinfo=berlin)):
        assert len({tick.date() for tick in ticks("30 2 * * *", start, 4, "Europe/Berlin")}) == 4
    hourly = ticks("0 * * * *", datetime(2026, 10, 25, 0, 30, tzinfo=berlin), 4, "Europe/Berlin")
    seconds = [tick.timestamp() for tick in hourly]
    assert [after - before for before, after in pairwise(seconds)] == [3600] * 3


def test_a_tick_never_comes_before_the_moment_it_is_asked_for() -> None:
    """02:15 comes twice on 25 October 2026 in Berlin: after the second, 02:30 of the first is over."""
    second = datetime(2026, 10, 25, 2, 15, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))
    assert Cron("30 2 * * *", "Europe/Berlin").after(second).date() == (second + DAY).date()


@pytest.mark.parametrize(
    ("handled", "now", "due"),
    [
        (SUNDAY, SUNDAY + timedelta(hours=2), None),
        (SUNDAY, SUNDAY + timedelta(hours=3), Due(SUNDAY + timedelta(hours=3), 0)),
        (SUNDAY, SUNDAY + 3 * DAY, Due(SUNDAY + 2 * DAY + timedelta(hours=3), 2)),
        (SUNDAY + timedelta(hours=3), SUNDAY + timedelta(hours=4), None),
        (SUNDAY + 5 * DAY, SUNDAY, None),  # the clock was set back: what was handled is not due again
    ],
)
def test_what_is_due(handled: datetime, now: datetime, due: Due | None) -> None:
    assert Cron("0 3 * * *", "UTC").due(handled, now) == due


def test_very_many_missed_ticks_are_counted_up_to_a_thousand_and_the_last_is_right() -> None:
    now = SUNDAY + timedelta(seconds=30)
    assert Cron("* * * * *", "UTC").due(SUNDAY - 1000 * DAY, now) == Due(SUNDAY, 999)
    last = SUNDAY - DAY + timedelta(hours=3, minutes=59)
    assert Cron("* 3 * * *", "UTC").due(SUNDAY - 1000 * DAY, now) == Due(last, 999)
    assert Cron("* * * * *", "Europe/Berlin").due(SUNDAY - 1000 * DAY, SUNDAY) == Due(SUNDAY, 999)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "store"


def edt(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return small.edt(*arguments, cwd=cwd, env={**os.environ, **variables})


def schedule(store: Path, cron: str = EVERY_MINUTE, *assignments: str, name: str | None = None, **more: bool) -> None:
    """As `edt schedule quickstart --no-serve`, without the start of a process, and with MLflow's tables made."""
    if not (store / "mlflow.db").exists():
        write_empty_mlflow(store)
    Schedules.at(str(store)).put(new_schedule(name, "quickstart", assignments, str(store), cron, "UTC", **more))


def missed(store: Path, since: datetime, name: str = "quickstart", **state: Any) -> None:
    """As of a server that was down since then."""
    schedules = Schedules.at(str(store))
    schedules.write(schedules.read(name).model_copy(update={"since": since}))
    schedules.write_state(name, State(handled=since, **state))


def missed_minutes(store: Path, name: str = "quickstart", **state: Any) -> None:
    """As of a server that was down for three minutes and a half when it is `NOW`."""
    missed(store, NOW - timedelta(minutes=3, seconds=30), name, **state)


def missed_new_year(store: Path, **state: Any) -> None:
    """As of a server that was down for more than a year, whatever the time is."""
    missed(store, datetime.now(UTC) - 400 * DAY, **state)


def state_of(store: Path, name: str = "quickstart") -> State:
    return Schedules.at(str(store)).state(name)


def last_of(store: Path) -> Tick:
    last = state_of(store).last
    assert last is not None
    return last


def eventually(ready: Callable[[], Any], *processes: subprocess.Popen[str]) -> None:
    """Wait until something is so, while these processes live."""

    def looked() -> Any:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        return ready()

    wait_for(looked)


@pytest.fixture
def start(store: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts servers whose runs wait for the file `go`; at the end none of them is left."""
    servers: list[subprocess.Popen[str]] = []

    def started() -> subprocess.Popen[str]:
        run = RUN.format(here=str(store.parent))
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(store), run],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        servers.append(server)
        return server

    yield started
    (store.parent / "go").touch()
    for server in servers:
        server.kill()
        server.wait()


def started_run(store: Path, server: subprocess.Popen[str], number: int = 1) -> int:
    """Process of a server's run, once it is at work and the server has written it down."""
    eventually(lambda: starts(store) == number, server)
    eventually(lambda: (running := state_of(store).running) and running.pid, server)
    running = state_of(store).running
    assert running is not None
    assert running.pid is not None
    return running.pid


@pytest.fixture
def run_is(store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what a run of a server in this process does: a shell's script."""

    def command_is(script: str) -> None:
        text = script.format(here=shlex.quote(str(store.parent)))
        monkeypatch.setattr(scheduler, "command", lambda schedule: ["sh", "-c", text])

    command_is(FINISHES)
    return command_is


def server_here(store: Path, say: Callable[[str], None] = print, now: datetime | None = None) -> Server:
    """A server of this process, which takes it to be `now`."""
    clock = {} if now is None else {"now": lambda: now}
    return Server(Schedules.at(str(store)), say, 0.02, **clock)


def attend(store: Path, now: datetime | None = NOW) -> str:
    """Do what is due as a server does, and return what it said."""
    told: list[str] = []
    server_here(store, told.append, now).attend("quickstart")
    return "\n".join(told)


@contextmanager
def serving(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server in a thread, for as long as the block lasts; it is `NOW` all the time, and no signal is for it."""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # for the main thread alone
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # which it sets, and is so put back
    server = server_here(store, now=NOW)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        wait_for((store / ".leases" / "schedules" / "0000000001.json").exists)
        yield
    finally:
        server.stopping.set()
        thread.join()


def starts(store: Path) -> int:
    path = store.parent / "started"
    return len(path.read_text().split()) if path.exists() else 0


def recorded(store: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("schedules")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def test_recorded_once_changed_by_name_paused_resumed_removed(store: Path) -> None:
    store.mkdir()

    def add(cron: str, *more: str) -> str:
        options = ["--cron", cron, "--timezone", "UTC", "--store", str(store), "--no-serve", *more]
        done = edt("schedule", "quickstart", *options, cwd=store.parent)
        assert done.returncode == 0, done
        return done.stdout

    told = add("0 3 * * 0")
    assert "schedule quickstart is new; next" in told
    assert f"it runs only while a server runs: edt schedule serve --store {store}" in told
    before = (store / ".schedules" / "quickstart.json").read_bytes()
    assert "is unchanged" in add("0 3 * * 0")
    assert (store / ".schedules" / "quickstart.json").read_bytes() == before
    assert "is changed" in add("0 4 * * 0", "--set", "train.max_steps=50")
    assert "schedule other is new" in add("0 4 * * 0", "--name", "other")
    options = ("--store", str(store))

    def listed() -> dict[str, Any]:
        return {row["name"]: row for row in json.loads(edt("schedule", "list", "--json", *options, cwd=store).stdout)}

    assert set(listed()) == {"quickstart", "other"}
    assert listed()["quickstart"]["assignments"] == ["train.max_steps=50"]
    assert datetime.fromisoformat(listed()["quickstart"]["next"]).strftime("%a %H:%M") == "Sun 04:00"
    assert "schedule quickstart is paused" in edt("schedule", "pause", "quickstart", *options, cwd=store).stdout
    assert (listed()["quickstart"]["state"], listed()["quickstart"]["next"]) == ("paused", None)
    assert "it is paused" in add("0 5 * * 0")
    assert (
        "schedule quickstart is resumed; next " in edt("schedule", "resume", "quickstart", *options, cwd=store).stdout
    )
    assert listed()["quickstart"]["state"] == "waiting"
    assert "schedule quickstart is removed" in edt("schedule", "remove", "quickstart", *options, cwd=store).stdout
    assert set(listed()) == {"other"}
    assert "no schedule 'quickstart'" in edt("schedule", "pause", "quickstart", *options, cwd=store).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--cron", "0 3 * * 9"], "day of week '9'"),
        (["quickstart", "--cron", "0 3 * * 0", "--timezone", "Nowhere"], "no time zone 'Nowhere'"),
        (["quickstart", "--cron", "0 3 * * 0", "--set", "train.max_step=5"], "unknown configuration key"),
        (["quickstart", "--cron", "0 3 * * 0", "--name", "../x"], "no valid schedule name"),
        (["no-such-config", "--cron", "0 3 * * 0"], "no configuration"),
        (["quickstart", "--cron", "0 3 * * 0", "--store", "/dev/null/store"], "cannot write to /dev/null/store"),
        (["remove", "nothing"], "no schedule 'nothing'"),
        (["pause", "../x"], "no schedule"),
    ],
)
def test_mistakes_leave_nothing_behind(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = edt("schedule", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.startswith("error: "), "Traceback" in done.stderr) == (2, True, False), done
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_told(store: Path) -> None:
    schedule(store)
    (store / ".schedules" / "quickstart.json").write_text("{}")
    done = edt("schedule", "list", "--store", str(store), cwd=store)
    assert done.returncode == 2
    assert "correct or remove the file" in done.stderr


def test_a_file_is_remembered_by_its_whole_path(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(edt("config", "show", cwd=tmp_path).stdout)
    made = new_schedule(None, "mine.yaml", ["train.max_steps=50"], "here", "0 3 * * 0", "UTC", address="auto")
    line = command(made)
    options = ("--no-overlap", "--store", str(tmp_path / "here"), "--set", "train.max_steps=50", "--address", "auto")
    assert line[4:] == ["run", *options, "--", str(tmp_path / "mine.yaml")]


def test_resumed_ticks_are_not_made_up_for(store: Path) -> None:
    schedule(store)
    missed_minutes(store)
    schedules = Schedules.at(str(store))
    schedules.pause("quickstart")
    schedules.resume("quickstart")
    since = schedules.read("quickstart").since
    assert schedules.read("quickstart").times.due(since, since) is None


def test_missed_ticks_are_one_run_and_one_record(store: Path, run_is: Callable[[str], None]) -> None:
    schedule(store)
    missed_minutes(store)
    told = attend(store)
    last = last_of(store)
    assert (starts(store), last.outcome, last.run) == (1, "finished", "run-id"), told
    assert (last.tick, last.missed, last.ended) == (NOW.replace(second=0), 2, NOW)
    (run,) = recorded(store)
    tags = run.data.tags
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "quickstart"
    assert tags["edt.schedule"] == "quickstart"
    assert (tags["edt.outcome"], tags["edt.run"]) == ("finished", "run-id")
    assert (tags["edt.tick"], tags["edt.missed"]) == ("2026-03-01T12:00:00+00:00", "2")
    assert list(store.glob("mlartifacts/**/*.log"))
    attend(store)
    assert starts(store) == 1  # nothing more is due
    attend(store, NOW + timedelta(minutes=1))
    assert (starts(store), last_of(store).missed) == (2, 0)


@pytest.mark.faults
def test_a_killed_server_is_followed_by_one_that_starts_nothing_twice(
    store: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    schedule(store, NEW_YEAR)
    missed_new_year(store)
    first = start()
    started_run(store, first)
    first.kill()
    first.wait()
    waited = []

    def say(text: str) -> None:
        if "continues (process" in text:
            waited.append(starts(store))
            (store.parent / "go").touch()

    server_here(store, say).attend("quickstart")
    assert waited == [1]
    last = last_of(store)
    assert (last.outcome, last.run, state_of(store).running, starts(store)) == ("finished", "run-id", None, 1)
    assert not state_of(store).unrecorded
    assert len(recorded(store)) == 1


@pytest.mark.faults
def test_a_run_that_was_lost_with_its_server_is_made_again_once(
    store: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    """As when the machine crashes; a run that brings the machine down does not do so for ever."""
    schedule(store, NEW_YEAR)
    missed_new_year(store)
    for attempt in (1, 2):
        server = start()
        run = started_run(store, server, attempt)
        server.kill()
        server.wait()
        os.kill(run, signal.SIGKILL)
    told = attend(store, now=None)
    assert state_of(store).handled == last_of(store).tick, told
    assert starts(store) == 2
    assert [run.data.tags["edt.outcome"] for run in recorded(store)] == ["lost", "lost"]
    assert {run.info.status for run in recorded(store)} == {"FAILED"}


@pytest.mark.extern
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_stopped_stops_its_run_and_the_next_one_goes_on(
    number: signal.Signals,
    store: Path,
    start: Callable[[], subprocess.Popen[str]],
    run_is: Callable[[str], None],
) -> None:
    schedule(store, NEW_YEAR)
    missed_new_year(store)
    server = start()
    started_run(store, server)
    server.send_signal(number)
    output, _ = server.communicate()
    assert server.returncode == 128 + number
    assert "stopping 1 run(s)" in output
    assert "Traceback" not in output
    (run,) = recorded(store)
    assert (run.info.status, run.data.tags["edt.outcome"]) == ("KILLED", "stopped")
    attend(store, now=None)
    assert (starts(store), last_of(store).outcome) == (2, "finished")


def test_the_folder_is_followed_while_serving(
    store: Path, run_is: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_empty_mlflow(store)
    with serving(store, monkeypatch):
        schedules = Schedules.at(str(store))
        since = NOW - timedelta(minutes=3, seconds=30)
        for name in ("paused", "late"):
            made = new_schedule(name, "quickstart", [], str(store), EVERY_MINUTE, "UTC")
            schedules.write_state(name, State(handled=since))
            schedules.write(made.model_copy(update={"since": since, "paused": name == "paused"}))
        wait_for(lambda: state_of(store, "late").last)
        assert state_of(store, "paused").last is None
        assert starts(store) == 1
        schedules.write(schedules.read("paused").model_copy(update={"paused": False}))
        wait_for(lambda: state_of(store, "paused").last)
        assert starts(store) == 2


def test_a_server_sees_a_tick_come_and_a_clock_that_is_set_back(
    store: Path, run_is: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at while nothing changes in the folder: once when it starts, and once for each tick that comes."""
    schedule(store)
    clock = [NOW]
    server = Server(Schedules.at(str(store)), print, now=lambda: clock[0])
    looks: list[datetime] = []
    monkeypatch.setattr(server, "attend", lambda name: looks.append(clock[0]))
    half, ahead = timedelta(seconds=30), NOW + 400 * DAY
    with ThreadPoolExecutor(1) as pool:
        for moment in (NOW, NOW + half / 2, NOW + half, NOW + half, ahead, NOW + half, NOW + half):
            clock[0] = moment
            server._sync(pool)
            for future in server._futures.values():
                future.result()
    assert looks == [NOW, NOW + half, ahead, NOW + half]


def test_a_record_that_cannot_be_read_holds_up_no_other(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        schedule(store, name=name)
    lines: list[str] = []
    server = Server(Schedules.at(str(store)), lines.append, now=lambda: NOW)
    read, attended = Schedules.read, []

    def failing(self: Schedules, name: str) -> Any:
        if name == "first":
            raise OSError("input/output error")
        return read(self, name)

    monkeypatch.setattr(Schedules, "read", failing)
    monkeypatch.setattr(server, "attend", attended.append)
    with ThreadPoolExecutor(1) as pool:
        server._sync(pool)
        server._sync(pool)
    assert attended == ["second"]
    assert len([line for line in lines if "input/output error" in line]) == 1


def test_one_server_a_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule(store, "0 3 * * 0")
    with serving(store, monkeypatch):
        done = edt("schedule", "serve", "--store", str(store), cwd=store)
        assert done.returncode == 2
        assert f"already serves the schedules of {store} (process {os.getpid()} on" in done.stderr
        options = ("--cron", "0 4 * * 0", "--timezone", "UTC", "--store", str(store))
        done = edt("schedule", "quickstart", *options, cwd=store)
        assert done.returncode == 0
        assert "is changed" in done.stdout
        assert f"a server is already running (process {os.getpid()} on" in done.stdout


def serve_until_recorded(store: Path, **variables: str) -> str:
    """A real server, until one tick has its outcome; returns what it printed."""
    server = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "schedule", "serve", "--store", str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **variables},
    )
    try:
        eventually(lambda: state_of(store).last and not state_of(store).unrecorded, server)
    finally:
        server.send_signal(signal.SIGTERM)
        output, _ = server.communicate()
    assert "Traceback" not in output
    return output


@pytest.mark.extern
def test_a_run_that_goes_on_elsewhere_is_left_alone(store: Path) -> None:
    """With the commands that a person gives, each in its own process."""
    from edt_core.store.folder import Folder

    schedule(store, NEW_YEAR)
    missed_new_year(store)
    with hold(Folder.at(store), run_lease("quickstart"), this_process()):
        done = edt("run", "quickstart", "--no-overlap", "--store", str(store), cwd=store)
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done
        assert f"is in progress (process {os.getpid()} on" in done.stdout
        serve_until_recorded(store)
    assert last_of(store).outcome == OVERLAP
    (run,) = recorded(store)
    assert (run.info.status, run.data.tags["edt.outcome"]) == ("FINISHED", OVERLAP)
    assert "edt.run" not in run.data.tags


def test_a_failed_run_is_recorded_with_its_reason(store: Path, run_is: Callable[[str], None]) -> None:
    schedule(store)
    missed_minutes(store)
    run_is(FAILS)
    attend(store)
    (run,) = recorded(store)
    assert (run.info.status, run.data.tags["edt.outcome"]) == ("FAILED", "failed")
    assert run.data.tags["edt.error"] == "exit code 2: error: the source is gone"


def test_a_killed_run_is_recorded_as_killed(store: Path, run_is: Callable[[str], None]) -> None:
    schedule(store)
    missed_minutes(store)
    run_is("echo 'train  step 3 of 8'; kill -KILL $$")
    attend(store)
    (run,) = recorded(store)
    assert (run.info.status, run.data.tags["edt.outcome"]) == ("FAILED", "failed")
    killed = "the run was killed by SIGKILL; the last line of its log: train  step 3 of 8"
    assert run.data.tags["edt.error"] == killed


def test_the_mlflow_run_of_a_killed_run_is_closed(store: Path, run_is: Callable[[str], None]) -> None:
    from edt_core.store.folder import Folder
    from pipelines.tracking.catalog import Catalog

    schedule(store)
    missed_minutes(store)
    catalog = Catalog.open(Folder.at(store), "quickstart")
    parent = catalog.start_run("quickstart", {"edt.workflow": "quickstart"})
    step = catalog.step_run("train", "checkpoint", "f" * 64, parent)
    report = f"from pipelines.schedule.record import report_to_scheduler as report; report(None, '{parent}')"
    run_is(f'{sys.executable} -c "{report}"; kill -KILL $$')
    attend(store)
    (run,) = recorded(store)
    assert (run.data.tags["edt.outcome"], run.data.tags["edt.run"]) == ("failed", parent)
    assert [catalog.client.get_run(run_id).info.status for run_id in (parent, step)] == ["KILLED", "KILLED"]


def test_unchanged_data_starts_nothing(store: Path, digits_folder: Path, run_is: Callable[[str], None]) -> None:
    from edt_core.config import SourceConfig
    from jobs.stages.preprocess import image_source

    same = image_source(SourceConfig(kind="image_folder", path=str(digits_folder))).fingerprint
    images = ("source.kind=image_folder", f"source.path={digits_folder}")
    schedule(store, EVERY_MINUTE, *images, when_data_changed=True)
    missed_minutes(store, source=same)
    attend(store)
    (run,) = recorded(store)
    assert (run.info.status, run.data.tags["edt.outcome"]) == ("FINISHED", UNCHANGED)
    assert run.data.tags["edt.source"] == same
    assert starts(store) == 0
    missed_minutes(store, source="0" * 64)
    attend(store)
    assert (starts(store), last_of(store).outcome, state_of(store).source) == (1, "finished", same)


def test_an_mlflow_that_is_away_does_not_stop_the_server(
    store: Path, run_is: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tick is recorded later, when the server is back."""
    schedule(store)
    missed_minutes(store)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert "cannot write to MLflow" in attend(store)
    assert (last_of(store).outcome, len(state_of(store).unrecorded)) == ("finished", 1)
    attend(store, NOW + timedelta(minutes=1))
    assert not state_of(store).unrecorded
    assert [run.data.tags["edt.outcome"] for run in recorded(store)] == ["finished", "finished"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_missed_tick_trains_a_model_and_the_next_finds_the_data_unchanged(store: Path) -> None:
    """The whole way, with a real pipeline of a few steps."""
    from mlflow import MlflowClient

    schedule(store, NEW_YEAR, *small.SMALL, when_data_changed=True)
    missed_new_year(store)
    serve_until_recorded(store)
    last = last_of(store)
    assert last.outcome == "finished", Path(str(last.log)).read_text()
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    parent = client.get_run(str(last.run))
    assert parent.data.tags["edt.workflow"] == "quickstart"
    (run,) = recorded(store)
    assert run.data.tags["edt.run"] == last.run
    assert run.data.tags["edt.source"] == parent.data.tags["edt.source"]
    missed_new_year(store, source=state_of(store).source)
    serve_until_recorded(store)
    assert sorted(run.data.tags["edt.outcome"] for run in recorded(store)) == ["finished", UNCHANGED]
