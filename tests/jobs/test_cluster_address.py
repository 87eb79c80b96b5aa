"""Addresses at which no Ray cluster answers are refused before Ray joins; a cluster that answers is not."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edt_core.errors import UserError
from jobs.runtime.cluster_address import check_answers, check_named
from tests.support.small import environment

EVERYWHERE = "0.0.0.0"  # Ray takes this machine's outward address for localhost


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """A port that accepts connections and says nothing."""
    with socket.create_server((EVERYWHERE, 0)) as server:  # the kernel accepts them
        yield server.getsockname()[1]


@contextlib.contextmanager
def http() -> Iterator[int]:
    """A port that speaks HTTP."""
    with ThreadingHTTPServer((EVERYWHERE, 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def closed() -> Iterator[int]:
    """A port on which nothing listens."""
    with socket.socket() as taken:  # bound, and so nobody else's
        taken.bind((EVERYWHERE, 0))
        yield taken.getsockname()[1]


@contextlib.contextmanager
def grpc_server(answer: Callable[[], bytes] | None) -> Iterator[int]:
    """A port that speaks gRPC, and knows the call of a Ray head where there is an answer for it."""
    import grpc

    class Head(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            if answer is None or not details.method.endswith("/CheckAlive"):
                return None
            return grpc.unary_unary_rpc_method_handler(lambda request, context: answer())

    server = grpc.server(ThreadPoolExecutor(2), handlers=(Head(),))
    port = server.add_insecure_port(f"{EVERYWHERE}:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (closed, "nothing listens on port"),
        (silent, "no answer in 0.5 s"),
        (http, "a server of another protocol listens on port"),
        (lambda: grpc_server(None), "is not a Ray head"),
    ],
    ids=["closed", "silent", "http", "another gRPC server"],
)
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_what_is_no_cluster_is_refused_with_its_address(server: Any, reason: str, scheme: str) -> None:
    if scheme:
        reason = reason.replace("Ray head", "Ray Client server")
    with server() as port, pytest.raises(UserError, match=reason) as caught:
        check_answers(f"{scheme}127.0.0.1:{port}", silence_s=0.5)
    assert f"{scheme}127.0.0.1:{port}" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("no-such-host.invalid:6379", "the name no-such-host.invalid does not resolve"),
        ("ray://no-such-host.invalid", "the name no-such-host.invalid does not resolve"),
        ("http://127.0.0.1:8265", "begins with http"),
        ("nonsense", "HOST:PORT was expected"),
        (":6379", "HOST:PORT was expected"),
        ("localhost:abc", "HOST:PORT was expected"),
    ],
)
def test_addresses_that_lead_nowhere(address: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        check_answers(address, silence_s=5.0)
    assert address in str(caught.value)


def test_auto_without_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    with pytest.raises(UserError, match="no Ray cluster at auto: no cluster runs on this machine"):
        check_answers("auto")


def test_a_head_that_is_busy_is_waited_for() -> None:
    """It accepts the call at once and answers later than a silent port is given up."""
    asked = []

    def late() -> bytes:
        asked.append(1)
        time.sleep(1.0 if len(asked) == 1 else 0.6)
        return b""

    with grpc_server(late) as port:
        check_answers(f"127.0.0.1:{port}", silence_s=0.3)
    assert len(asked) == 2


def test_only_a_named_cluster_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("jobs.runtime.cluster_address.check_answers", asked.append)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_named()
    assert asked == []
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    check_named()
    check_named("there:2")
    assert asked == ["elsewhere:1", "there:2"]


@pytest.mark.extern
def test_a_verb_says_so_before_it_lists_its_images(tmp_path: Path) -> None:
    """Ray itself would try for minutes."""
    with silent() as port:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "jobs.preprocess", str(tmp_path / "images"), str(tmp_path / "out")],
            env=environment(RAY_ADDRESS=f"127.0.0.1:{port}", PYTHONPATH=os.getcwd()),
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - started
    assert done.returncode == 2, done
    assert done.stderr.startswith(f"error: no Ray cluster answers at 127.0.0.1:{port}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert seconds < 90
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_a_live_cluster_is_not_refused(ray_session: None) -> None:
    import ray

    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:  # also when many ask at once
        list(pool.map(check_answers, [ray.get_runtime_context().gcs_address] * 32))
    assert time.monotonic() - started < 60
