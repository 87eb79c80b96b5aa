"""The MLflow UI of a store: links to runs, and a server that is started for it and ends with the process that asked."""

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
_TRIED = 100  # ports from the default one on
_START_SECONDS = 300  # a person waits, and can end it; a full machine is slow
_STOP_SECONDS = 10


def run_link(tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """Where a person sees a run: its page on an MLflow server, or the command that shows it from a SQLite file."""
    if tracking_uri.startswith(("http://", "https://")):
        return f"{redacted(tracking_uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    if (database := sqlite_path(tracking_uri)) is not None:
        return shlex.join(["edt", "ui", "--store", str(database.parent), "--run", run_id])
    return f"run {run_id} in {redacted(tracking_uri)}"


def free_port(host: str, wanted: int | None) -> int:
    """A port to listen on: the wanted one, or else the first free one from MLflow's own on.

    Raises UserError where the wanted one is taken, or the host is none of this machine.
    """
    for port in [wanted] if wanted is not None else range(DEFAULT_PORT, DEFAULT_PORT + _TRIED):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((host, port))
                return int(tried.getsockname()[1])
            except PermissionError as error:
                raise UserError(f"port {port} is for root alone; give --port a number from 1024 on") from error
            except socket.gaierror as error:
                raise UserError(f"--host {host} is no address of this machine ({error.strerror})") from error
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise UserError(f"cannot listen on {host}: {error.strerror}; give another --host") from error
    if wanted is not None:
        raise UserError(f"port {wanted} of {host} is taken; give another --port, or none for the first free one")
    raise UserError(f"no port from {DEFAULT_PORT} to {DEFAULT_PORT + _TRIED - 1} is free; give one with --port")


@contextmanager
def served(tracking_uri: str, artifacts: Path, host: str, port: int) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """An MLflow server of a SQLite file, once it answers: its URL and process. It and its children are gone afterwards.

    Raises UserError where it does not come up, with its last words.
    """
    command = python_command("-m", "mlflow", "server", "--artifacts-destination", artifacts.as_uri())
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    if (database := sqlite_path(tracking_uri)) is not None and not database.is_absolute():
        tracking_uri = sqlite_uri(database.absolute())  # the server works in another folder
    # Not on the command line, which every user of the machine can read: a database's URI may have a password.
    environment = {**server_environment(), "MLFLOW_BACKEND_STORE_URI": tracking_uri}
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host}:{port}"
    # An empty folder of this user: uvicorn and gunicorn put the folder that they work in on their path themselves.
    with tempfile.TemporaryDirectory(prefix="edt-ui-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
            process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=folder, env=environment, start_new_session=True
            )
        try:
            _await(url, process, log)
            yield url, process
        finally:
            stop(process)


def server_environment() -> dict[str, str]:
    """Of a server that shows runs: without the processes for MLflow's own jobs, which take seconds to start."""
    return child_environment({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ})


def _await(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return once the server answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine's ports
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with suppress(OSError), direct.open(f"{url}/health", timeout=5):
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    words = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ended = "did not answer" if process.poll() is None else f"ended with code {process.returncode}"
    raise UserError(f"the MLflow server {ended}: {redacted((words or ['it said nothing'])[-1])[:500]}")


def stop(process: "subprocess.Popen[bytes]", seconds: float = _STOP_SECONDS) -> None:
    """End a server and everything that it started: gently, and what is left after so many seconds by force."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with suppress(ProcessLookupError):  # the group outlives its leader, and children may be slower than it
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
    """The newest workflow runs with the experiments that they are in."""
    from pipelines.tracking.runs import workflow_runs

    found = (run for run, _ in zip(workflow_runs(catalog), range(number), strict=False))
    return [
        {
            "run": run.info.run_id,
            "experiment": run.info.experiment_id,
            "pipeline": run.data.tags["edt.workflow"],
            "status": run.info.status,
        }
        for run in found
    ]


def experiment_of(catalog: Any, run_id: str) -> str:
    """The experiment that a run is in. Raises UserError where MLflow has no such run."""
    from mlflow.exceptions import MlflowException

    try:
        return str(catalog.client.get_run(run_id).info.experiment_id)
    except MlflowException as error:
        raise UserError(f"MLflow has no run {run_id} ({error.error_code}); `edt runs` lists those it has") from error
