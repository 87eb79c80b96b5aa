"""`edt serve`: a server on Ray Serve that follows the alias, and ends in order; mistakes before anything is started."""

import io
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
from typer.testing import CliRunner

from edt_core.errors import UserError
from pipelines.cli import app
from pipelines.cluster.ui import free_port
from tests.support.processes import beyond_loopback, descendants, listeners, wait_for
from tests.support.registry import Registry
from tests.support.serving import NAME, add_served, crown_served
from tests.support.small import start


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two versions, of which the first is champion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry(tmp_path_factory.mktemp("serving") / "store")
        patch.setenv("MLFLOW_TRACKING_URI", registry.catalog.tracking_uri)
        assert [add_served(registry, seed) for seed in (1, 2)] == ["1", "2"]
    return registry


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_mistakes_are_refused_before_ray_starts(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.catalog.tracking_uri)
    assert "no registered model" in refused("s3://bucket/model")
    assert f"no model {NAME}@none" in refused(f"{NAME}@none")
    assert "use auto, cpu or cuda" in refused(NAME, "--device", "tpu")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused(NAME, "--port", str(port)) == f"port {port} of 127.0.0.1 is in use; set another --port"


def test_without_ray_serve_the_message_has_the_command(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.delattr("ray.serve", raising=False)
    assert "pip install 'edt-pipeline[serve]'" in refused(NAME)


@pytest.mark.ray
def test_a_served_model_follows_its_alias_and_ends_in_order(registry: Registry) -> None:
    port = free_port("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}"
    options = ["--num-cpus", "1", "--batch-size", "2", "--max-queue", "1", "--poll", "0.2"]
    process = start("serve", NAME, *registry.arguments, "--device", "cpu", "--port", str(port), *options)
    try:
        assert _until_ready(process).startswith(f"{url}  {NAME}/1")
        assert requests.get(f"{url}/health", timeout=60).json()["version"] == "1"
        assert beyond_loopback(listeners(process.pid)) == []
        first = _images(url)
        crown_served(registry, "2")
        answers = [_post(url, [3, 1])]
        while answers[-1].headers["X-EDT-Version"] == "1":
            answers.append(_post(url, [3, 1]))
        assert {answer.status_code for answer in answers} == {200}, "no request is lost"
        assert not np.array_equal(_images(url), first)
        with ThreadPoolExecutor(24) as pool:  # 4 run, 1 waits
            crowd = list(pool.map(lambda _: _post(url, [0]), range(24)))
            assert {answer.status_code for answer in crowd} == {200, 503}
            assert all(int(answer.headers["Retry-After"]) >= 1 for answer in crowd if answer.status_code == 503)
            slow = pool.submit(_post, url, [2] * 8, num_inference_steps=200)
            wait_for(lambda: "edt_serve_running 1.0" in requests.get(f"{url}/metrics", timeout=60).text)
            children = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            assert slow.result().status_code == 200, "what ran at SIGTERM is answered"
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        assert "stopped" in output
        wait_for(lambda: not {pid for pid, began in descendants(1).items() if children.get(pid) == began})
    finally:
        process.kill()


def _until_ready(process: "subprocess.Popen[str]") -> str:
    """The line with the address, after which everything answers."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("http://"):
            return line
    raise AssertionError("".join(lines))


def _post(url: str, labels: list[int], **more: Any) -> requests.Response:
    return requests.post(f"{url}/sample", json={"labels": labels, "seed": 7, **more}, timeout=600)


def _images(url: str) -> Any:
    answer = _post(url, [3, 1], format="npz")
    assert answer.status_code == 200, answer.text
    with np.load(io.BytesIO(answer.content)) as file:
        return file["images"]
