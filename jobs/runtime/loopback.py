"""What a Ray session of our own listens on: loopback, so that other machines reach none of its processes."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
# What the processes of a training say to each other; else they listen on the address of the machine's name.
INTERFACES = {"GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": _LOOPBACK_INTERFACE}
# Ray's metrics are served without its token, to every user of the machine.
_UNLESS_SET = {"RAY_enable_metrics_collection": "0"}


@contextmanager
def on_loopback() -> Iterator[None]:
    """Inside, `ray.init("local")` starts a session whose processes listen on loopback alone and serve no metrics.

    Ray has no switch for the metrics of its autoscaler and of its head process, on ports 44217 and 44227 of loopback.

    Each server of Ray binds to loopback where the address of its node is 127.0.0.1, and to every interface otherwise.
    Ray puts the machine's own address in the place of a `_node_ip_address="127.0.0.1"`, unless clusters are switched
    off, as they are by default on macOS and Windows. The processes that are started inside keep the variables; in this
    process they are put back, for it may join a cluster later. RAY_enable_metrics_collection=1 serves the metrics.
    """
    from ray._private import ray_constants

    unless_set = {name: value for name, value in _UNLESS_SET.items() if name not in os.environ}
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    with _variables({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", **INTERFACES, **unless_set}):
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = clusters


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and put them back as they were."""
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
