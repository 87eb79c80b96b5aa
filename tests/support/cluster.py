"""A Ray cluster on this machine whose worker nodes come and go, and are soon missed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as autoscaling

from tests.support.processes import wait_for

# A node whose processes are gone refuses every connection, so three quick looks show that it is lost. One that is only
# slow has a minute for each answer.
_SYSTEM = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 60_000,
    "health_check_failure_threshold": 3,
}
_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often the controller looks after its workers
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",  # how often it asks which nodes will be taken away
    # How long it tries to place workers before it counts the nodes again; a worker is missed sooner than its node.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3",
}


class _Coordinator(autoscaling._AutoscalingCoordinatorActor):
    """Ray's count of what trainings may use, counted anew at each question.

    Ray's own counts every 20 s: until then a training waits for workers on a node that is lost.
    """

    def get_reserved_resources(self, requester_id: str, recompute: bool = True) -> Any:
        return super().get_reserved_resources(requester_id, recompute)


@dataclass
class Nodes:
    """The worker nodes of a cluster, the oldest first. Its head has no CPU, so that all work is on them."""

    cluster: Any
    workers: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def have(self, number: int, num_cpus: int = 1) -> list[Any]:
        """Exactly so many worker nodes of one size: others are taken away, what is missing is added."""
        for node in [node for node in self.workers if node.get_resource_and_label_spec().num_cpus != num_cpus]:
            self.lose(node)
        while len(self.workers) > number:
            self.lose(self.workers[-1])
        while len(self.workers) < number:
            self.add(num_cpus)
        expected = {node.node_id for node in (self.cluster.head_node, *self.workers)}
        wait_for(lambda: alive() == expected)
        return list(self.workers)

    def add(self, num_cpus: int = 1) -> Any:
        node = self.cluster.add_node(wait=False, num_cpus=num_cpus)
        wait_for(lambda: node.node_id in alive())
        self.workers.append(node)
        return node

    def lose(self, node: Any) -> None:
        """SIGKILL everything that runs on a node."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.workers.remove(node)

    def drain(self, node: Any, deadline_s: float) -> None:
        """Tell the cluster that a node will be taken away, as a cloud's notice of preemption does."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + deadline_s) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason, "a test", deadline_ms)
        assert accepted, why


def alive() -> set[str]:
    """The nodes that the cluster takes for alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def cluster_of_nodes() -> Iterator[Nodes]:
    """A cluster with this process as its driver, in place of the Ray session that there may be."""
    from jobs.runtime.cluster import connect

    ray.shutdown()
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _SYSTEM}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in _TRAIN.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            connect(str(cluster.address))
            patch.setattr(autoscaling, "_AutoscalingCoordinatorActor", _Coordinator)
            autoscaling.get_or_create_autoscaling_coordinator()  # all others find this one by its name
            yield Nodes(cluster)
        finally:
            ray.shutdown()
            cluster.shutdown()
