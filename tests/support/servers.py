"""Servers on loopback: MLflow's and one that speaks S3 in processes of their own, and others in threads."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.processes import wait_for


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class MlflowServer:
    """`mlflow server` on a loopback port, with its database in a folder; can be killed and started again."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.port, self.variables = free_port(), variables
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        import requests

        from pipelines.cluster.ui import server_environment

        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--serve-artifacts"]
        with (self.folder / "server.log").open("ab") as log:
            environment = {**server_environment(), **self.variables}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            try:
                return requests.get(f"{self.uri}/health", timeout=60).ok
            except requests.RequestException:
                return False

        wait_for(answers, pause=0.2)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def moto_server() -> Iterator[str]:
    """Endpoint of an S3 server on a free loopback port."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        assert server.poll() is None, "the S3 server did not start"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    try:
        wait_for(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


class QuietHandler(BaseHTTPRequestHandler):
    """Answers requests without a line on stderr for each."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def listening(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """URL of an HTTP server on a free loopback port, which threads of this process serve by this handler."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def receiver(
    status: int = 200, headers: dict[str, str] | None = None, wait: threading.Event | None = None
) -> Iterator[tuple[str, list[bytes]]]:
    """An HTTP server on a free loopback port; yields its URL and the bodies that were posted to it."""
    bodies: list[bytes] = []

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            if wait is not None:
                wait.wait(60)
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815  the name that http.server calls

    with listening(Handler) as url:
        try:
            yield url, bodies
        finally:
            if wait is not None:
                wait.set()
