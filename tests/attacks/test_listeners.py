"""Another machine knocks at every port: what a Ray session of our own listens on is loopback, and no metrics go out.

docs/security.md lists what listens.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import TrainConfig
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


def meet(job: dict[str, Any]) -> None:
    """Each worker's part of a training that computes nothing: a sum over all workers, and what listens meanwhile."""
    import torch
    from torch import distributed

    rank = torch.tensor([1.0 + distributed.get_rank()])
    distributed.all_reduce(rank)
    (Path(job["folder"]) / f"{distributed.get_rank()}.json").write_text(
        json.dumps({"sum": rank.item(), "listeners": sorted(listeners(os.getpid()))})
    )
    distributed.barrier()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_workers_of_a_training_on_one_machine_listen_on_loopback_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's TCP store would listen on every interface, and let anybody change what the workers agree on."""
    from edt_core.store.folder import Folder
    from jobs.stages import train

    class Out:
        data = Folder.at(tmp_path / "out")

    monkeypatch.setattr(train, "_worker", meet)
    config = TrainConfig(model="EDT-Tiny/2", num_workers=2, num_cpus_per_worker=0.5, global_batch_size=8)
    before = set(process_groups())
    train._in_thread(train._trainer(config, {"folder": str(tmp_path), "out": Out}, "run").fit)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [worker["sum"] for worker in told] == [3.0, 3.0]
    found = {(str(title), str(address), int(port)) for worker in told for title, address, port in worker["listeners"]}
    assert found
    assert beyond_loopback(found) == []
    assert set(process_groups()) <= before  # the file by which they met


def process_groups() -> Iterator[Path]:
    import tempfile

    return Path(tempfile.gettempdir()).glob("edt-process-group-*")


@pytest.mark.extern
def test_a_listener_on_every_interface_is_found() -> None:
    """That the look at sockets sees what it is for."""
    code = "import socket, sys; s = socket.create_server(('', 0)); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        ((_, address, _),) = beyond_loopback(listeners(process.pid))
        assert address == "0.0.0.0"
