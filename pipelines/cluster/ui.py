"""The MLflow UI of a store: links to runs, and a server that ends with the process that started it."""

import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edt_core.child_process import child_environment, python_command
from edt_core.errors import UserError
from edt_core.printing.redaction import redacted
from jobs.runtime.tracking import sqlite_path, sqlite_uri

DEFAULT_PORT = 5000
_PORTS = 100  # tried from the default one on
_START_SECONDS = 300  # long, because a busy machine is slow and a person can stop it
_STOP_SECONDS = 10


def run_link(tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """Where to see a run: its page on an MLflow server, or the command that shows it from a SQLite file."""
    if tracking_uri.startswith(("http://", "https://")):
        return f"{redacted(tracking_uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    if (database := sqlite_path(tracking_uri)) is not None:
        return shlex.join(["edt", "ui", "--store", str(database.parent), "--run", run_id])
    return f"run {run_id} in {redacted(tracking_uri)}"


def free_port(host: str, requested: int | None, or_else: str = ", or omit it for the first free one") -> int:
    """A port to listen on: the requested one, or else the first free one from MLflow's default on.

    Raises UserError if the requested one is in use, or the host is no address of this machine. `or_else` ends the
    message for a requested one.
    """
    for port in [requested] if requested is not None else range(DEFAULT_PORT, DEFAULT_PORT + _PORTS):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((host, port))
                return int(server.getsockname()[1])
            except PermissionError as error:
                raise UserError(f"port {port} requires root; use --port with a number of at least 1024") from error
            except socket.gaierror as error:
                raise UserError(f"--host {host} is no address of this machine ({error.strerror})") from error
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise UserError(f"cannot listen on {host}: {error.strerror}; set another --host") from error
    if requested is not None:
        raise UserError(f"port {requested} of {host} is in use; set another --port{or_else}")
    raise UserError(f"no port from {DEFAULT_PORT} to {DEFAULT_PORT + _PORTS - 1} is free; set a free one with --port")


@contextmanager
def served(tracking_uri: str, artifacts: Path, host: str, port: int) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The URL and process of an MLflow server, once it answers. The server and its children end with the context.

    Raises UserError, with the server's last output, if it does not start.
    """
    command = python_command("-m", "mlflow", "server", "--artifacts-destination", artifacts.as_uri())
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    if (database := sqlite_path(tracking_uri)) is not None and not database.is_absolute():
        tracking_uri = sqlite_uri(database.absolute())  # the server runs in another folder
    # Not on the command line, which every user of the machine can read: the URI may contain a password.
    environment = {**server_environment(), "MLFLOW_BACKEND_STORE_URI": tracking_uri}
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host}:{port}"
    # An empty private folder: uvicorn and gunicorn add their working directory to the import path.
    with tempfile.TemporaryDirectory(prefix="edt-ui-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            # In a new session, Ctrl-C reaches only this process, which then stops the server in order.
            process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=folder, env=environment, start_new_session=True
            )
        try:
            _await(url, process, log)
            yield url, process
        finally:
            stop(process)


def server_environment() -> dict[str, str]:
    """The environment of an MLflow server without MLflow's job processes, which take seconds to start."""
    return child_environment({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ})


def _await(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the server answers. Raises UserError if it ends or does not answer in time."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's ports
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(OSError), direct.open(f"{url}/health", timeout=5):
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    state = "did not answer" if process.poll() is None else f"ended with code {process.returncode}"
    raise UserError(f"the MLflow server {state}: {redacted((lines or ['no output'])[-1])[:500]}")


def stop(process: "subprocess.Popen[bytes]", seconds: float = _STOP_SECONDS) -> None:
    """Stop a server and its children: with SIGTERM, and after this many seconds with SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with suppress(ProcessLookupError):  # children may outlive the leader of the group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def has_display() -> bool:
    """Whether a browser can be opened on this machine."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def last_runs(catalog: Any, number: int) -> list[dict[str, Any]]:
    """The newest pipeline runs, with their experiments."""
    from pipelines.tracking.runs import workflow_runs

    runs = (run for run, _ in zip(workflow_runs(catalog), range(number), strict=False))
    return [
        {
            "run": run.info.run_id,
            "experiment": run.info.experiment_id,
            "pipeline": run.data.tags["edt.workflow"],
            "status": run.info.status,
        }
        for run in runs
    ]


def experiment_of(catalog: Any, run_id: str) -> str:
    """The experiment of a run. Raises UserError if MLflow has no such run."""
    from mlflow.exceptions import MlflowException

    try:
        return str(catalog.client.get_run(run_id).info.experiment_id)
    except MlflowException as error:
        raise UserError(f"MLflow has no run {run_id} ({error.error_code}); `edt runs` lists its runs") from error
