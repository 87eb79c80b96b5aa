"""Hosts on this machine: each has its own network, disks, name and processes, and shares only the code and a network.

`lan()` is the network, with its services (`Lan.services`) on a host of their own; `Lan.host` adds one. This process is
connected to it too. `Host.kill` is a power cut: the link goes first, so that no connection is closed, and then every
process. The kernel removes namespaces, links and disks with the last process in them; all end with this process,
however it ends, because their first process reads from it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
_HERE = Path(__file__).parent
_KINDS = ("mount", "uts", "ipc", "net", "pid")  # of namespaces
_BRIDGE = "edt-lan"


def ip(*words: object, inside: int | None = None) -> None:
    """iproute2's `ip`, in the network of a process if one is given."""
    enter = [] if inside is None else ["nsenter", f"--target={inside}", "--net"]
    done = subprocess.run([*enter, "ip", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(map(str, words))}: {done.stderr}"


@dataclass
class Host:
    """A host and its first process (`pid`, as this process sees it)."""

    name: str
    address: str
    environment: Mapping[str, str]
    process: "subprocess.Popen[str]"
    pid: int
    wire: "subprocess.Popen[str] | None" = None

    def start(self, *command: str, **options: Any) -> "subprocess.Popen[str]":
        """Start a program in the host. It ends with the host."""
        enter = ["nsenter", f"--target={self.pid}", *(f"--{kind}" for kind in _KINDS), "--wdns=/root"]
        environment = {**self.environment, **options.pop("env", {})}
        return subprocess.Popen(
            [*enter, *command], env=environment, text=True, stdin=subprocess.DEVNULL, start_new_session=True, **options
        )

    def run(self, *command: str, **options: Any) -> str:
        """A program in the host to its end; what it printed."""
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        text = process.communicate()[0]
        assert process.returncode == 0, f"{' '.join(command)} on {self.name}: {process.returncode}\n{text}"
        return text

    def kill(self) -> None:
        """The power fails: nobody hears from the host again."""
        with suppress(AssertionError):  # it is dead already
            ip("link", "set", "eth0", "down", inside=self.pid)
        self.end()

    def end(self) -> None:
        for process in filter(None, (self.process, self.wire)):
            process.kill()
            process.wait()
            for stream in filter(None, (process.stdin, process.stdout)):
                stream.close()


@dataclass
class Lan:
    """The network: a bridge in the namespace of `services`. With a delay or a loss, that of each host's link."""

    subnet: str
    environment: Mapping[str, str]
    delay_s: float = 0.0
    loss: float = 0.0
    hosts: list[Host] = field(default_factory=list)

    @property
    def services(self) -> Host:
        return self.hosts[0]

    @property
    def here(self) -> str:
        """The address of this process."""
        return f"{self.subnet}.254"

    @property
    def device(self) -> str:
        """The link of this process."""
        return f"edt{os.getpid()}"

    def address(self, number: int) -> str:
        return f"{self.subnet}.{number}"

    def host(self, name: str, number: int, **environment: str) -> Host:
        """A new host with this address. Its variables are those of the network, and these."""
        host = self._boot(name, number, environment)
        port = f"port{len(self.hosts)}"  # that of a host that died may be there for another moment
        if self.delay_s or self.loss:
            host.wire = self._wire(host, port)
        else:
            ip("link", "add", port, "type", "veth", "peer", "eth0", "netns", host.pid, inside=self._switch)
        ip("link", "set", port, "up", "master", _BRIDGE, inside=self._switch)
        ip("link", "set", "eth0", "address", f"02:00:00:00:00:{number:02x}", inside=host.pid)  # others know it
        self._up(host, "eth0")
        return host

    @property
    def _switch(self) -> int:
        return self.services.pid

    def _boot(self, name: str, number: int, environment: Mapping[str, str]) -> Host:
        kept = sorted({str(REPOSITORY), sys.prefix, os.path.realpath(sys.prefix), sys.base_prefix})
        unshare = ["unshare", *(f"--{kind}" for kind in _KINDS), "--fork", "--kill-child", "--mount-proc"]
        command = [*unshare, sys.executable, "-S", str(_HERE / "init.py"), name, *kept]
        process = _ready(command)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        host = Host(name, self.address(number), {**self.environment, **environment}, process, int(children))
        self.hosts.append(host)
        return host

    def _up(self, host: Host, device: str) -> None:
        ip("address", "add", f"{host.address}/24", "dev", device, inside=host.pid)
        ip("link", "set", device, "up", inside=host.pid)

    def _wire(self, host: Host, port: str) -> "subprocess.Popen[str]":
        end = f"host-{port}"
        words = [end, port, str(self.delay_s), str(self.loss), str(len(self.hosts))]
        inside = ["nsenter", f"--target={self._switch}", "--net"]
        wire = _ready([*inside, sys.executable, "-S", str(_HERE / "wire.py"), *words])
        ip("link", "set", end, "netns", host.pid, "name", "eth0", inside=self._switch)
        return wire

    def open(self) -> None:
        """The services' host with the bridge, and this process's own link."""
        services = self._boot("services", 1, {})
        # Without an address of its own it has that of one of its ports, which come and go.
        ip("link", "add", _BRIDGE, "address", "02:00:00:00:00:01", "type", "bridge", inside=services.pid)
        self._up(services, _BRIDGE)
        device = self.device
        ip("link", "add", device, "type", "veth", "peer", "outside", "netns", services.pid)
        ip("link", "set", "outside", "up", "master", _BRIDGE, inside=services.pid)
        ip("address", "add", f"{self.here}/24", "dev", device)
        ip("link", "set", device, "up")

    def close(self) -> None:
        with suppress(AssertionError):  # it was not made; with the bridge it would go a moment later
            ip("link", "delete", self.device)
        for host in reversed(self.hosts):
            host.end()


@contextmanager
def lan(delay_s: float = 0.0, loss: float = 0.0, **environment: str) -> Iterator[Lan]:
    """A network without hosts yet but its services; skips where this process may not make one."""
    _skip_without_rights(delay_s or loss)
    network = Lan(f"198.18.{os.getpid() % 250}", {**_variables(), **environment}, delay_s, loss)
    try:
        network.open()
        yield network
    finally:
        network.close()


def _variables() -> dict[str, str]:
    """What a new machine's environment has, and where the code is."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _skip_without_rights(wired: float) -> None:
    probe = [
        "unshare",
        *(f"--{kind}" for kind in _KINDS),
        "--fork",
        "--mount-proc",
        "ip",
        "link",
        "add",
        "type",
        "veth",
    ]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"hosts need unshare (util-linux) and ip (iproute2): {error}")
    if done.returncode:
        pytest.skip(f"hosts need root's right to make namespaces and veth devices: {done.stderr.strip()}")
    if wired and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("slow and lossy links need /dev/net/tun")


def _ready(command: list[str]) -> "subprocess.Popen[str]":
    """Start a program that says when it is ready, and lives no longer than this process."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", f"{command} did not start"
    return process
