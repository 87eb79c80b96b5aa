"""Bind a Ray session started here to loopback, so that other machines cannot reach its processes."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
# For the traffic between training processes. By default they listen on the address of the machine's name.
INTERFACES = {"GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": _LOOPBACK_INTERFACE}
# Ray serves its metrics without its token, to every user of the machine.
_UNLESS_SET = {"RAY_enable_metrics_collection": "0"}


@contextmanager
def on_loopback() -> Iterator[None]:
    """Inside, `ray.init("local")` starts a session whose processes listen only on loopback and serve no metrics.

    The autoscaler and the head process still serve theirs, on ports 44217 and 44227 of loopback: Ray has no switch for
    them. RAY_enable_metrics_collection=1 turns the other metrics on.

    Each Ray server binds to loopback if the address of its node is 127.0.0.1, and to every interface otherwise.
    Ray replaces `_node_ip_address="127.0.0.1"` with the machine's own address unless clusters are disabled, as they are
    by default on macOS and Windows. Processes started inside keep the environment variables; in this process the
    variables are restored, because it may join a cluster later.
    """
    from ray._private import ray_constants

    unless_set = {name: value for name, value in _UNLESS_SET.items() if name not in os.environ}
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    with variables({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", **INTERFACES, **unless_set}):
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = clusters


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def grpc_on_loopback() -> None:
    """Bind the gRPC servers that this process starts from now on to loopback instead of all interfaces.

    A replica of Ray Serve listens for other replicas on every interface, without a token, and unpickles what arrives.
    Ray has no switch for it.
    """
    from grpc.aio import _server  # grpc.aio.Server is only its interface

    bind: Callable[[Any, str], int] = _server.Server.add_insecure_port

    def bind_here(server: Any, address: str) -> int:
        return bind(server, address.replace("[::]:", "127.0.0.1:"))

    _server.Server.add_insecure_port = bind_here
