"""edt ui: a server on the store's SQLite that answers, and is gone with whoever asked; links to runs."""

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from edt_core.errors import UserError
from pipelines.cli import app
from pipelines.cluster import ui
from pipelines.cluster.ui import DEFAULT_PORT, free_port, has_display, run_link, stop
from tests.support.processes import beyond_loopback, listeners
from tests.support.registry import Registry
from tests.support.small import EDT, environment


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["ui", "--no-open", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_a_run_s_link_is_its_page_or_the_command_that_shows_it() -> None:
    assert run_link("http://host:5000/", "3", "abc") == "http://host:5000/#/experiments/3/runs/abc"
    assert "secret" not in run_link("https://me:secret@host", "3", "abc")
    assert run_link("sqlite:////data/my-store/mlflow.db", "3", "abc") == "edt ui --store /data/my-store --run abc"
    assert run_link("sqlite:////my store/mlflow.db", "3", "a") == "edt ui --store '/my store' --run a"
    assert "secret" not in run_link("postgresql://me:secret@host/db", "3", "abc")


def test_a_port_that_is_taken_is_left_alone() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", first := free_port("127.0.0.1", None)))
        taken.listen()
        assert DEFAULT_PORT <= first < free_port("127.0.0.1", None)


def test_addresses_that_are_none_of_this_machine_are_told() -> None:
    with pytest.raises(UserError, match="no address of this machine"):
        free_port("no.such.host.invalid", 0)
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1"):
        free_port("192.0.2.1", 0)


def test_a_store_without_mlflow_is_told_and_left_as_it_is(tmp_path: Path) -> None:
    assert "no MLflow record in the store" in refused("--store", str(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []


def test_a_browser_is_opened_only_where_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert has_display()
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4")
    assert not has_display()


def test_a_server_is_ended_with_its_children() -> None:
    """Also those that ignore SIGTERM. The output ends when the last process that could write to it is gone."""
    script = "trap '' TERM; sleep 600 & echo ready; wait"
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    stop(process, seconds=0.2)
    assert process.returncode == -signal.SIGKILL
    assert process.stdout.read() == b""


def test_a_relative_database_is_that_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server works in a folder of its own, where it would make an empty one."""
    started: dict[str, Any] = {}

    def start(command: list[str], **options: Any) -> SimpleNamespace:
        started.update(options["env"])
        return SimpleNamespace(pid=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(ui, "_await", lambda *given: None)
    monkeypatch.setattr(ui, "stop", lambda process: None)
    for given, served in [
        ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"),
        ("sqlite:////data/mlflow.db?timeout=9", "sqlite:////data/mlflow.db?timeout=9"),
    ]:
        with ui.served(given, tmp_path / "mlartifacts", "127.0.0.1", 5000):
            assert started["MLFLOW_BACKEND_STORE_URI"] == served


@pytest.mark.extern
def test_a_store_s_runs_are_served_until_ctrl_c(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_id, _ = Registry(store).run()
    before = {path.name for path in store.iterdir()}
    process = subprocess.Popen(
        [*EDT, "ui", "--no-open", "--store", str(store), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line.strip())
        if "Ctrl-C" in line:
            break
    url = told[0]
    with urllib.request.urlopen(url) as page:
        assert b"<html" in page.read().lower()
    assert len(found := listeners(process.pid)) > 0
    assert beyond_loopback(found) == []
    assert any(line.endswith(f"/runs/{run_id}") and url in line for line in told)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    host, _, port = url.removeprefix("http://").rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
    assert {path.name for path in store.iterdir()} - before <= {"mlartifacts"}
