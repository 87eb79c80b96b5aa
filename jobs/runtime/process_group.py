"""How the workers of a Ray Train job meet, and by which network they reach each other.

On one machine they meet in a file: Ray Train's own rendezvous starts PyTorch's TCP store, which listens on every
interface and requires no token. On several machines gloo would listen on the address that a machine's name has on that
machine: 127.0.1.1, if `/etc/hosts` is as Debian writes it. So it gets the interface of the address in Ray.
"""

import fcntl
import os
import shutil
import socket
import struct
import sys
import tempfile
from contextlib import suppress
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

_SIOCGIFADDR = 0x8915  # of linux/sockios.h


class OneMachineConfig(TorchConfig):
    """Ray Train's PyTorch settings, with a file instead of the TCP store."""

    @property
    def backend_cls(self) -> type["OneMachineBackend"]:
        return OneMachineBackend


class OneMachineBackend(_TorchBackend):
    """Joins the workers to a process group, in the process of Ray Train's controller."""

    def __init__(self) -> None:
        self._folder: str | None = None

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join the workers of a started group: at the start of a training, or after lost workers were replaced."""
        self._remove()
        self._folder = tempfile.mkdtemp(prefix="edt-process-group-")
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        worker_group.execute(_set_torch_distributed_env_vars)
        pending = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend or ("nccl" if gpus > 0 else "gloo"),
                world_rank=rank,
                world_size=len(worker_group),
                init_method=f"file://{self._folder}/store",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(pending)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Shut down the process group, and remove the file."""
        super().on_shutdown(worker_group, backend_config)
        self._remove()

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class ManyMachinesConfig(TorchConfig):
    """Ray Train's PyTorch settings, with the interface for gloo."""

    @property
    def backend_cls(self) -> type["ManyMachinesBackend"]:
        return ManyMachinesBackend


class ManyMachinesBackend(_TorchBackend):
    """Joins the workers to a process group, in the process of Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join the workers of a started group."""
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Let gloo use the interface of this node's address in Ray, unless GLOO_SOCKET_IFNAME names one."""
    if (name := interface_of(ray.util.get_node_ip_address())) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface of this machine with an IPv4 address; None if there is none, or the system is not Linux."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
