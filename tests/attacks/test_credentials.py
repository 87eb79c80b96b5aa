"""Credentials that somebody reads where they do not belong: a record, a process list, a file of everybody's folder."""

import json
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edt_core.errors import UserError
from edt_core.printing.redaction import redacted
from pipelines.cluster import ui
from pipelines.cluster.submission import TRAVELS, request_for
from pipelines.config.schema import load_config
from pipelines.schedule import server as scheduler
from pipelines.schedule.record import (
    RunResult,
    Schedules,
    new_schedule,
    read_result,
    report_to_scheduler,
    result_environment,
)
from pipelines.setup import doctor_checks
from pipelines.terminal.run_log import RunLog
from tests.support import small
from tests.support.registry import write_empty_mlflow

PASSWORD = "canary1/can@ry2'canary3"
WEIGHTS = f"inception.weights=https://me:{PASSWORD}@host/w.pth#sha256={'a' * 64}"


@pytest.fixture(params=[0o000, 0o002, 0o022])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def check_hidden(text: str) -> None:
    assert not any(part in text for part in ("canary1", "ry2", "canary3")), text


def test_a_schedule_is_its_owner_s_alone(umask: int, tmp_path: Path) -> None:
    """Its record, its state, its log and what its run tells, and the folders that they are in."""
    store = tmp_path / "store"
    write_empty_mlflow(store)
    schedules = Schedules.at(str(store))
    schedules.put(new_schedule("one", "quickstart", [], str(store), "* * * * *", "UTC"))
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    schedules.write(schedules.read("one").model_copy(update={"since": long_ago}))
    server = scheduler.Server(schedules, print, 0.02, lambda: long_ago + timedelta(minutes=2))
    script = 'echo said; printf \'{"outcome": "finished"}\' > "$EDT_SCHEDULE_RESULT"; chmod 600 "$EDT_SCHEDULE_RESULT"'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "command", lambda schedule: ["sh", "-c", script])
        server.attend("one")
    last = schedules.state("one").last
    assert last is not None
    assert last.outcome == "finished", last
    root = store / ".schedules"
    below = [root, *root.rglob("*")]
    assert {path.name for path in below} >= {"one.json", "state", "work", "one.alive"}
    assert any(path.suffix == ".log" for path in below)
    found = {str(path.relative_to(store)): f"{mode(path):04o}" for path in below if path.is_file()}
    assert set(found.values()) == {"0600"}, found
    found = {str(path.relative_to(store)): f"{mode(path):04o}" for path in below if path.is_dir()}
    assert set(found.values()) == {"0700"}, found


def test_what_a_run_tells_its_scheduler_is_its_owner_s_alone(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own" / "x.result.json"
    path.parent.mkdir(mode=0o700)
    for name, value in result_environment(path).items():
        monkeypatch.setenv(name, value)
    report_to_scheduler("finished", "run-id")
    assert f"{mode(path):04o}" == "0600"
    assert read_result(path) == RunResult(outcome="finished", run="run-id")


def test_a_folder_that_was_open_before_is_closed(tmp_path: Path) -> None:
    write_empty_mlflow(tmp_path)
    (tmp_path / ".schedules").mkdir()
    (tmp_path / ".schedules").chmod(0o755)
    Schedules.at(str(tmp_path)).put(new_schedule("one", "quickstart", [], str(tmp_path), "* * * * *", "UTC"))
    assert f"{mode(tmp_path / '.schedules'):04o}" == "0700"


@pytest.mark.parametrize(
    "assignments",
    [
        (WEIGHTS, "extractors=[inception]", "promote.metric=fid", "evaluate.allow_rank_deficient=true"),
        ("source.kind=image_folder", "source.path=/data/a-secret-of-mine/x"),
    ],
)
def test_a_schedule_with_a_secret_is_refused_with_the_way_to_give_it(
    assignments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in a URL, and one that is the value of a secret variable."""
    monkeypatch.setenv("MY_API_KEY", "a-secret-of-mine")
    options = [part for text in assignments for part in ("--set", text)]
    options += ["--cron", "0 3 * * 0", "--timezone", "UTC", "--store", str(tmp_path / "store"), "--no-serve"]
    done = small.edt("schedule", "quickstart", *options, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 2, done
    assert "contains a credential" in done.stderr
    assert "in the environment of `edt schedule serve`" in done.stderr
    assert "a-secret-of-mine" not in done.stderr
    check_hidden(done.stdout + done.stderr)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", TRAVELS)
def test_a_variable_with_a_password_does_not_travel(name: str) -> None:
    """Also one that urllib takes for a part of the path."""
    config = load_config("quickstart", [], "s3://bucket/store")
    for password in (PASSWORD, "a/b", "a?b", "a#b", "a@b", "ab", "a'b"):
        request = request_for(config, "http://cluster:8265", {name: f"https://me:{password}@host"})
        assert name not in request.variables
        assert "is not sent" in request.notes[0]


def test_a_database_s_password_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the server that `edt ui` starts: every user of a machine can read those."""
    started: dict[str, Any] = {}

    def start(command: list[str], **options: Any) -> SimpleNamespace:
        started.update(options, command=command, mode=mode(Path(options["cwd"])))
        return SimpleNamespace(pid=0)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(ui, "_await", lambda *given: None)
    monkeypatch.setattr(ui, "stop", lambda process: None)
    uri = f"postgresql://me:{PASSWORD}@host/db"
    with ui.served(uri, tmp_path / "mlartifacts", "127.0.0.1", 5000):
        pass
    check_hidden(" ".join(started["command"]))
    assert started["env"]["MLFLOW_BACKEND_STORE_URI"] == uri
    assert started["mode"] == 0o700
    assert not Path(started["cwd"]).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_log_is_its_owner_s_alone(umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for store in (str(tmp_path / "store"), "s3://bucket/store"):
        log = RunLog.new(store, "run")
        assert f"{mode(log.path):04o}" == "0600"
    assert f"{mode(log.path.parent):04o}" == "0700"


def test_a_log_does_not_follow_what_others_left_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link by the name of our folder leads to a place of somebody else; there it is better to write nothing."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / f"edt-logs-{os.getuid()}").symlink_to(theirs)
    log = RunLog.new("s3://bucket/store", "run")
    assert str(log.path) == os.devnull
    assert list(theirs.iterdir()) == []


def test_the_doctor_warns_of_a_store_that_everybody_can_write(tmp_path: Path) -> None:
    store = tmp_path / "my store"
    store.mkdir()
    patient: Any = SimpleNamespace(config=load_config("quickstart", [], str(store)))
    assert doctor_checks.store(patient)[0] == "ok"
    store.chmod(0o777)
    status, found, remedy = doctor_checks.store(patient)
    assert (status, remedy) == ("warn", f"run `chmod o-w '{store}'`")
    assert "every user of this machine can write" in found


def test_nothing_of_a_password_is_left_in_what_is_printed() -> None:
    for text in (f"cannot reach http://admin:{PASSWORD}@host/x", json.dumps({"uri": f"http://admin:{PASSWORD}@host"})):
        check_hidden(str(UserError(text)))


@pytest.mark.parametrize("text", ["x-", "&" + 500 * "token", "http://a", "'--", 'password="', "bearer a"])
def test_a_text_of_a_server_is_searched_in_linear_time(text: str) -> None:
    """A name that is joined to itself was searched from each of its parts to the end: 16 KB took 20 s."""

    def seconds(length: int) -> float:
        long, taken = (text * length)[:length], []
        for _ in range(3):
            began = time.process_time()
            redacted(long)
            taken.append(time.process_time() - began)
        return min(taken)

    assert seconds(16_000) < 8 * seconds(4_000)  # 4 times as long; 16 times, if each part were searched to the end


def test_a_container_of_azure_is_no_credential(tmp_path: Path) -> None:
    """A schedule of such images was refused, and a job of them as well."""
    images = "abfss://images@account.dfs.core.windows.net/train"
    options = ["source.kind=image_folder", f"source.path={images}"]
    made = new_schedule("weekly", "quickstart", options, str(tmp_path), "0 3 * * 0", "UTC")
    assert made.assignments[1].endswith(images)
    request = request_for(load_config("quickstart", options, "s3://bucket/store"), "http://cluster:8265", {})
    assert images in request.config_yaml
