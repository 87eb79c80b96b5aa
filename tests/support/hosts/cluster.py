"""A Ray cluster of hosts without a shared disk: the store is a bucket of an S3 server, MLflow a server.

Both servers, and Redis if the head is to survive, are on a host of their own. The head has no CPU, as on Kubernetes,
and the work is on the others, which come (`begin`) and go (`lose`).
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.clocks import sitecustomize
from tests.support.hosts.lan import Host, Lan, lan
from tests.support.processes import wait_for

S3_PORT, MLFLOW_PORT, RAY_PORT, REDIS_PORT = 5000, 5001, 6379, 6380
_BUCKET = "edt"
# By default Ray counts a silent node as lost after a minute, and waits minutes for the answers it owes.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "6000",
    "RAY_health_check_failure_threshold": "2",
}
_QUICK = {
    "RAY_worker_niceness": "0",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}


@dataclass
class RayHosts:
    """The cluster's hosts: the head, the workers with the oldest first, and those that only drivers are on."""

    network: Lan
    head_variables: Mapping[str, str]
    head: Host
    workers: list[Host] = field(default_factory=list)
    _last: int = 10

    @property
    def address(self) -> str:
        return f"{self.network.address(10)}:{RAY_PORT}"

    @property
    def store(self) -> str:
        return f"s3://{_BUCKET}/store"

    def begin(self, num_cpus: int = 2, clock_s: int = 0) -> Host:
        """A new worker host, which joins the cluster. Its Python's clock is set forward by so many seconds."""
        self._last += 1
        paths = f"/root/clock:{self.network.environment['PYTHONPATH']}"
        host = self.network.host(f"worker-{self._last}", self._last, PYTHONPATH=paths)
        host.run("mkdir", "/root/clock")
        host.run("sh", "-c", 'echo "$0" > /root/clock/sitecustomize.py', sitecustomize(clock_s) if clock_s else "")
        _ray(host, f"--address={self.address}", f"--num-cpus={num_cpus}")
        self.workers.append(host)
        return host

    def driver(self, clock_s: int = 0) -> Host:
        """A new host without CPUs for Ray, so that nothing is on it but drivers, and what has to be beside them."""
        host = self.begin(num_cpus=0, clock_s=clock_s)
        self.workers.remove(host)
        return host

    def lose(self, host: Host) -> None:
        """A power cut of one host."""
        self.workers.remove(host)
        host.kill()

    def restart_head(self) -> None:
        """A power cut of the head, and a new host at its address."""
        self.head.kill()
        self.head = start_head(self.network, self.head_variables)


def start_head(network: Lan, variables: Mapping[str, str]) -> Host:
    host = network.host("head", 10, **variables)
    _ray(host, "--head", f"--port={RAY_PORT}", "--num-cpus=0", "--include-dashboard=false")
    return host


def _ray(host: Host, *words: str) -> None:
    common = (f"--node-ip-address={host.address}", "--object-store-memory=100000000", "--disable-usage-stats")
    host.run(sys.executable, "-m", "ray.scripts.scripts", "start", *words, *common)


@contextmanager
def ray_hosts(
    workers: int = 2, *, delay_s: float = 0.0, loss: float = 0.0, redis: bool = False, **variables: str
) -> Iterator[RayHosts]:
    """The cluster with so many workers. Inside, this process reads the bucket with the cluster's credentials."""
    with lan(delay_s, loss) as network, pytest.MonkeyPatch.context() as patch:
        surroundings = _surroundings(network)
        network.environment = {**network.environment, **surroundings, **_QUICK, **variables}
        for name, value in surroundings.items():
            patch.setenv(name, value)
        servers = _start_servers(network, redis)
        head = dict(_HEALTH)
        if redis:
            head["RAY_REDIS_ADDRESS"] = f"{network.services.address}:{REDIS_PORT}"
        cluster = RayHosts(network, head, start_head(network, head))
        for _ in range(workers):
            cluster.begin()
        _wait_for_servers(network, servers)
        _make_bucket()
        yield cluster


def _surroundings(network: Lan) -> dict[str, str]:
    """Credentials and addresses, the same on all hosts."""
    place = network.address(1)
    return {
        "AWS_ACCESS_KEY_ID": "test-access-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{place}:{S3_PORT}",
        "MLFLOW_TRACKING_URI": f"http://{place}:{MLFLOW_PORT}",
    }


def _start_servers(network: Lan, redis: bool) -> "dict[int, subprocess.Popen[str]]":
    """Start the servers of the services' host, each with its port."""
    place, python = network.address(1), sys.executable
    mlflow = ["--host", place, "--port", str(MLFLOW_PORT), "--workers", "1", "--serve-artifacts"]
    mlflow += ["--backend-store-uri", "sqlite:////root/mlflow.db", "--artifacts-destination", "/root/artifacts"]
    commands = {
        S3_PORT: [python, "-m", "moto.server", "-H", place, "-p", str(S3_PORT)],
        MLFLOW_PORT: [python, "-m", "mlflow", "server", *mlflow, "--allowed-hosts", f"{place}:{MLFLOW_PORT}"],
    }
    if redis:
        commands[REDIS_PORT] = ["redis-server", "--bind", place, "--port", str(REDIS_PORT), "--protected-mode", "no"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet["env"] = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes that nobody needs
    return {port: network.services.start(*command, **quiet) for port, command in commands.items()}


def _wait_for_servers(network: Lan, servers: "Mapping[int, subprocess.Popen[str]]") -> None:
    import socket

    def answers(port: int) -> bool:
        assert servers[port].poll() is None, f"the server of port {port} ended"
        try:
            socket.create_connection((network.address(1), port), timeout=5).close()
        except OSError:
            return False
        return True

    for port in servers:
        wait_for(lambda: answers(port), pause=0.1)  # noqa: B023


def _make_bucket() -> None:
    import fsspec

    system = fsspec.get_filesystem_class("s3")
    system.clear_instance_cache()  # they keep the environment of their making
    fsspec.filesystem("s3").mkdir(_BUCKET)
