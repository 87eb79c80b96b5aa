"""The server that starts the due runs of a store's schedules, each in a separate process.

A state file for each schedule records which ticks are handled and which run is in progress. So a server can be killed
at any moment: the next one neither starts a run twice nor forgets a tick. A run keeps a locked file open while it is
alive, which shows the next server whether a run that it did not start is still in progress.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edt_core.child_process import child_environment, python_command
from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.files.private_files import FILE_MODE, make_private, private_opener
from edt_core.printing.redaction import redacted
from pipelines.schedule.lease import hold, this_process
from pipelines.schedule.notice import notify_of_tick
from pipelines.schedule.record import (
    OVERLAP,
    SERVER_LEASE,
    UNCHANGED,
    Schedule,
    Schedules,
    State,
    Tick,
    read_result,
    result_environment,
)

_ATTEMPTS = 2  # at a tick whose run is lost together with its server
_LOG = re.compile(r".+-\d{8}T\d{6}Z-\d+\.log")
_CLOCK_SET_BACK = timedelta(days=1)  # a smaller step back does not make handled ticks due again
_SIDE_BY_SIDE = 64  # schedules that are handled at once
_LOGS = 50  # kept, for all schedules together
_STATUS = {"failed": "FAILED", "lost": "FAILED", "stopped": "KILLED"}


class _Look(NamedTuple):
    """The last time that a schedule was checked, and when its next tick comes."""

    schedule: Schedule
    at: datetime
    next: datetime


class Server:
    """Runs every schedule of a store until it is stopped. Raises Taken if another server runs them."""

    def __init__(
        self,
        schedules: Schedules,
        say: Callable[[str], None],
        poll_s: float | None = None,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        self.schedules, self.say, self.now = schedules, say, now or partial(datetime.now, UTC)
        self.poll_s = poll_s or (1.0 if schedules.store.local else 10.0)
        self.stopping = threading.Event()
        self.environment = dict(os.environ)
        self._pids: dict[str, int] = {}  # runs in progress, by schedule
        self._looks: dict[str, _Look] = {}
        self._futures: dict[str, Future[None]] = {}  # the last `attend` of each schedule
        self._problems: dict[str, str] = {}  # the last message about each schedule that cannot be served
        self._interrupted: set[int] = set()
        self._signals: list[int] = []

    def serve(self) -> int:
        """Serve until a signal or the loss of the lease, and return the exit code."""
        # The next tick tries again if MLflow is down; runs have their own number of retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        with (
            hold(self.schedules.store, SERVER_LEASE, this_process(), on_lost=self._lose),
            ThreadPoolExecutor(_SIDE_BY_SIDE) as pool,
        ):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)
            self.say(f"serving the schedules of {self.schedules.store.uri}")
            while not self.stopping.wait(self.poll_s):
                try:
                    self._sync(pool)
                except Exception as error:  # the store may be unreachable for a while
                    self._log("schedules", f"cannot be read: {error}")
            self._stop_runs()
        return 128 + self._signals[0] if self._signals else 1

    def attend(self, name: str) -> None:
        """Run what is due of a schedule, one run after another. Never raises."""
        try:
            self._settle(name)
            while not self.stopping.is_set() and self._make_due(name):
                pass
        except Exception as error:
            self._log(name, f"{type(error).__name__}: {error}")

    def _sync(self, pool: ThreadPoolExecutor) -> None:
        """Handle the schedules that were added, changed or resumed, or that have a due tick."""
        names = self.schedules.names()
        for name in self._looks.keys() - set(names):
            del self._looks[name]
        for name in names:
            try:
                self._look(name, pool)
                self._problems.pop(name, None)
            except (UserError, OSError) as error:  # other schedules continue
                if self._problems.get(name) != str(error):
                    self._problems[name] = str(error)
                    self._log(name, f"refused: {error}")

    def _look(self, name: str, pool: ThreadPoolExecutor) -> None:
        schedule, now, last = self.schedules.read(name), self.now(), self._looks.get(name)
        if (
            last is not None and last.schedule == schedule and last.at <= now < last.next
        ):  # `last.at > now`: the clock was set back
            return
        look = _Look(schedule, now, schedule.times.after(now))
        if name not in self._futures or self._futures[name].done():
            self._looks[name] = look
            self._futures[name] = pool.submit(self.attend, name)

    def _make_due(self, name: str) -> bool:
        """Handle all due ticks with one run. Returns whether there were any."""
        if name not in self.schedules.names() or (schedule := self.schedules.read(name)).paused:
            return False
        state, now = self.schedules.state(name), self.now()
        handled = self._handled(schedule, state, now)
        due = schedule.times.due(handled, now)
        if due is None:
            return False
        tick = Tick(tick=due.tick, missed=due.missed, started=now)
        try:
            source = self._source(schedule) if schedule.when_data_changed else None
            tick = tick.model_copy(update={"source": source})
            if source is not None and source == state.source:
                tick = tick.model_copy(update={"outcome": UNCHANGED})
            else:
                tick = self._run(schedule, state, tick)
        except BlockingIOError:  # a run that is no longer in the state file
            tick = tick.model_copy(update={"outcome": OVERLAP})
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            tick = tick.model_copy(update={"outcome": "failed", "error": message})
        self._finish(name, tick)
        return True

    def _handled(self, schedule: Schedule, state: State, now: datetime) -> datetime:
        """The time up to which ticks are handled.

        A recorded time in the future, from a clock that was days ahead, is ignored: nothing would be due until then.
        The correction goes to the state and not to the record, which a person may pause or change at this moment.
        """
        latest = now + _CLOCK_SET_BACK
        past = [time for time in (state.handled, schedule.since) if time is not None and time <= latest]
        if (state.handled is None and past) or state.handled in past:
            return max(past)
        since = _iso(state.handled or schedule.since)
        self._log(schedule.name, f"warning: the clock was set back, from {since} or later; earlier ticks are skipped")
        self._write_state(schedule.name, state.model_copy(update={"handled": now}))
        return now

    def _source(self, schedule: Schedule) -> str:
        """The identity of the current images."""
        from pipelines.config.schema import load_config
        from pipelines.pipeline import prepare_source
        from pipelines.terminal.terminal import Terminal

        config = load_config(schedule.config, schedule.assignments, schedule.store)
        source = config.source
        if source.path is not None and "://" not in source.path:
            path = Path(schedule.folder) / typed_path(source.path)
            source = source.model_copy(update={"path": str(path)})
        return prepare_source(source, self.schedules.store, Terminal()).fingerprint

    def _run(self, schedule: Schedule, state: State, tick: Tick) -> Tick:
        """Run the pipeline of a tick in a separate process, wait for it, and return the tick with its outcome."""
        work = self.schedules.workplace
        make_private(work)
        stem = f"{schedule.name}-{tick.tick.astimezone(UTC):%Y%m%dT%H%M%SZ}-{state.lost + 1}"
        tick = tick.model_copy(update={"log": str(work / f"{stem}.log")})
        state = state.model_copy(update={"running": tick})
        self.schedules.write_state(schedule.name, state)
        self._result_path(tick).unlink(missing_ok=True)
        log_path = str(tick.log)
        with _Alive(self._alive_path(schedule.name)) as alive, open(log_path, "ab", opener=private_opener) as log:
            child = subprocess.Popen(
                command(schedule),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=schedule.folder,
                env=child_environment(self.environment, **result_environment(self._result_path(tick))),
                start_new_session=True,  # Ctrl-C in the server's terminal must not reach the run
                pass_fds=(alive,),
            )
        self._pids[schedule.name] = child.pid
        try:
            running = tick.model_copy(update={"pid": child.pid})
            self.schedules.write_state(schedule.name, state.model_copy(update={"running": running}))
            self._log(schedule.name, f"run started; log: {tick.log}")
            if self.stopping.is_set():
                self._interrupt(child.pid)
            return self._with_outcome(running, child.wait())
        finally:
            del self._pids[schedule.name]

    def _with_outcome(self, tick: Tick, code: int | None) -> Tick:
        """The tick of a run that has ended, with the outcome that the run reported, or else that of its exit code."""
        result = read_result(self._result_path(tick))
        if result is not None and result.outcome is not None:
            outcome = result.outcome
        elif code is None:
            outcome = "lost"
        else:
            stopped = code in (130, -signal.SIGINT, -signal.SIGTERM) or tick.pid in self._interrupted
            outcome = "finished" if code == 0 else "stopped" if stopped else "failed"
        error = f"{_ending(code)}: {_reason(self.schedules.log(tick))}" if outcome == "failed" else None
        run = result.run if result else None
        self._result_path(tick).unlink(missing_ok=True)
        reported = result is not None and result.outcome is not None
        fields = {"outcome": outcome, "run": run, "error": error, "reported": reported}
        return tick.model_copy(update=fields)

    def _settle(self, name: str) -> None:
        """Wait for a run that an earlier server started, and record it. A run that died with its server is lost."""
        tick = self.schedules.state(name).running
        if tick is None:
            return
        if _is_held(self._alive_path(name)):
            self._pids[name] = tick.pid or 0
            self._log(name, f"the run of {_iso(tick.tick)} continues (process {tick.pid})")
            try:
                while _is_held(self._alive_path(name)):
                    time.sleep(min(self.poll_s, 1.0))
            finally:
                del self._pids[name]
        self._finish(name, self._with_outcome(tick, None))

    def _finish(self, name: str, tick: Tick) -> None:
        """Record the outcome of a tick in the state file and in MLflow."""
        tick = tick.model_copy(update={"ended": self.now()})
        state = self.schedules.state(name)
        # The next server resumes a run that stopped because this server ends.
        again = tick.outcome == "stopped" and self.stopping.is_set()
        lost = state.lost + 1 if tick.outcome == "lost" else 0
        again = again or 0 < lost < _ATTEMPTS
        fields: dict[str, Any] = {"last": tick, "running": None, "lost": lost if again else 0}
        if not again:
            fields["handled"] = tick.tick
        if tick.outcome == "finished":
            fields["source"] = tick.source
        state = state.model_copy(update={**fields, "unrecorded": (*state.unrecorded, tick)})
        self._write_state(name, state)
        self._log(name, _outcome_text(tick))
        self._record(name, state)
        if not again and name in self.schedules.names():
            notify_of_tick(self.schedules.read(name), tick, lambda text: self._log(name, f"warning: {text}"))
        self._prune_logs()

    def _record(self, name: str, state: State) -> None:
        """Write the ended ticks to MLflow. If that fails, the next tick tries again."""
        ticks = list(state.unrecorded)
        try:
            while ticks:
                record(self.schedules, name, ticks[0])
                del ticks[0]
        except Exception as error:
            self._log(name, f"warning: cannot write to MLflow; the next tick tries again: {error}")
        self._write_state(name, state.model_copy(update={"unrecorded": tuple(ticks)}))

    def _write_state(self, name: str, state: State) -> None:
        if name in self.schedules.names():  # a removed schedule leaves no state behind
            self.schedules.write_state(name, state)

    def _stop_runs(self) -> None:
        """Interrupt the runs, which stop where they can resume, and wait for them."""
        if pids := dict(self._pids):
            self.say(
                f"stopping {len(pids)} run(s), which the next server resumes; press Ctrl-C again to exit immediately"
            )
            for pid in pids.values():
                self._interrupt(pid)
        while self._pids:
            time.sleep(0.1)
        self.say("stopped; no run is in progress")

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signals.append(number)
        self.stopping.set()
        if len(self._signals) > 1:
            self.say(f"exiting now; {len(self._pids)} run(s) stop on their own")
            sys.stdout.flush()
            os._exit(128 + number)  # a normal exit would wait for the threads of these runs

    def _interrupt(self, pid: int) -> None:
        """Send a run one Ctrl-C. A second one would stop it before its checkpoint is written."""
        if pid and pid not in self._interrupted:
            self._interrupted.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)

    def _lose(self) -> None:
        self._log("schedules", "another server considered this one dead and has taken over")
        self.stopping.set()

    def _alive_path(self, name: str) -> Path:
        return self.schedules.workplace / f"{name}.alive"

    def _result_path(self, tick: Tick) -> Path:
        """The file to which the run of a tick reports its outcome. The tick must have a log."""
        return (self.schedules.log(tick) or Path(os.devnull)).with_suffix(".result.json")

    def _prune_logs(self) -> None:
        logs = (path for path in self.schedules.workplace.glob("*.log") if _LOG.fullmatch(path.name))
        for path in sorted(logs, key=lambda path: path.stat().st_mtime)[:-_LOGS]:
            path.unlink(missing_ok=True)

    def _log(self, name: str, text: str) -> None:
        self.say(f"{_iso(datetime.now(UTC))}  {name}  {text}")


def command(schedule: Schedule) -> list[str]:
    """The command line of one run of a schedule."""
    options = [part for text in schedule.assignments for part in ("--set", text)]
    address = ["--address", schedule.address] if schedule.address else []
    verb = ["retrain", "--when-data-changed"] if schedule.retrain else ["run"]
    line = [*verb, "--no-overlap", "--store", schedule.store, *options, *address, "--", schedule.config]
    return python_command("-m", "pipelines.cli", *line)


def record(schedules: Schedules, name: str, tick: Tick) -> None:
    """Write the outcome of a tick as a run of the MLflow experiment `schedules`."""
    from pipelines.tracking.catalog import Catalog

    catalog = Catalog.open(schedules.store, "schedules")
    if tick.run is not None:
        catalog.end_abandoned(tick.run)
    tags = {
        "edt.schedule": name,
        "edt.tick": _iso(tick.tick),
        "edt.outcome": tick.outcome,
        "edt.missed": str(tick.missed),
        "edt.run": tick.run,
        "edt.source": tick.source,
        "edt.log": tick.log,
        "edt.error": tick.error and tick.error[:4000],
    }
    start, end = (int(moment.timestamp() * 1000) for moment in (tick.started, tick.ended or tick.started))
    safe_tags = {key: redacted(value) for key, value in tags.items() if value is not None}
    run = catalog.client.create_run(catalog.experiment_id, start, safe_tags, name)
    if (log := schedules.log(tick)) is not None and log.exists():
        catalog.client.log_artifact(run.info.run_id, str(log))
    catalog.client.set_terminated(run.info.run_id, _STATUS.get(tick.outcome or "", "FINISHED"), end)


class _Alive:
    """A locked file whose lock a child process inherits: it is released when the child ends, not the parent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        import fcntl

        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, FILE_MODE)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(self.file)
            raise
        return self.file

    def __exit__(self, *_: object) -> None:
        os.close(self.file)


def _is_held(path: Path) -> bool:
    """Whether a living run holds this file."""
    if not path.exists():
        return False
    try:
        with _Alive(path):
            return False
    except BlockingIOError:
        return True


def _ending(code: int | None) -> str:
    """How the process of a failed run ended. Its last words do not say so if it was killed."""
    if code is None or code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"the run was killed by {signal.Signals(-code).name}; the last line of its log"
    return f"the run was killed by signal {-code}; the last line of its log"


def _reason(log: Path | None) -> str:
    """The last error in a run's log, or its last line if there is none."""
    with suppress(OSError):
        text = "" if log is None else log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.split("\n") if line.strip()]
        return next((line for line in reversed(lines) if line.startswith("error:")), "".join(lines[-1:]))[:1000]
    return ""


def _outcome_text(tick: Tick) -> str:
    missed = f", also for {tick.missed} earlier ones" if tick.missed else ""
    return f"{tick.outcome} ({_iso(tick.tick)}{missed})" + (f": {tick.error}" if tick.error else "")


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
