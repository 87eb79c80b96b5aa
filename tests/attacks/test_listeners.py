"""Another machine knocks at every port: what a Ray session of our own listens on is loopback, and no metrics go out.

docs/security.md lists what listens. The workers of a training are looked at in tests/jobs/test_jobs.py.
"""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import beyond_loopback, listeners, wait_for

_RAY = {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "a worker", "the driver"}


def kind(title: str) -> str:
    """Which process of a Ray session it is, by its title."""
    if title == sys.executable or Path(title).name.startswith("python") or "pytest" in title:
        return "the driver"
    name = Path(title).name
    return name if name in _RAY else "a worker" if title.startswith("ray::") else title


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_session_of_our_own_listens_on_loopback_alone() -> None:
    import ray
    from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
    from ray.dashboard.consts import DASHBOARD_METRIC_PORT

    class Holder:
        def process(self) -> int:
            return os.getpid()

    holder: Any = ray.remote(Holder).options(num_cpus=0).remote()
    worker = ray.get(holder.process.remote())

    def complete() -> set[tuple[str, str, int]]:
        seen = listeners(os.getpid())
        return seen if {kind(title) for title, _, _ in seen} >= _RAY else set()

    found = wait_for(complete)
    assert beyond_loopback(found) == []
    assert {port for _, _, port in listeners(worker)} <= {port for _, _, port in found}
    ray.kill(holder)
    # Ray has no switch for the figures of its autoscaler, which never has a node to add here, and of its head.
    told = {port for _, address, port in found if "# HELP" in page(address, port)}
    assert told <= {AUTOSCALER_METRIC_PORT, DASHBOARD_METRIC_PORT}


def page(address: str, port: int) -> str:
    """What is answered to who asks for metrics; nothing where no HTTP is spoken."""
    with suppress(OSError), socket.create_connection((address.removeprefix("::ffff:"), port), 10) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
        return connection.recv(1 << 16).decode(errors="replace")
    return ""


@pytest.mark.extern
def test_a_listener_on_every_interface_is_found() -> None:
    """That the look at sockets sees what it is for."""
    code = "import socket, sys; s = socket.create_server(('', 0)); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        ((_, address, _),) = beyond_loopback(listeners(process.pid))
        assert address == "0.0.0.0"
