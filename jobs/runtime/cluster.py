"""The Ray session: join the named cluster, or start one on this machine."""

import logging
import os
import sys
from typing import Any

import ray
import ray.exceptions
import ray.job_config

from edt_core.errors import Stopped, UserError
from jobs.runtime.cluster_address import check_answers, first_line, named_address
from jobs.runtime.loopback import on_loopback
from jobs.runtime.termination import term_kept

_OWN = "edt_own_session"  # a resource that marks a session that `connect` started
_OBJECT_STORE_BYTES = 512 << 20  # artifacts go through the store on disk; Ray's objects here are small


class _JobConfig(ray.job_config.JobConfig):
    """Workers import from the folders that the driver imports from, and from no others.

    Ray puts the driver's working directory first on the path of its workers, even if it is not on the driver's own.
    A `torch.py` in a data folder would then run in every worker.
    """

    def _serialize(self) -> str:
        own = {os.path.realpath(entry or os.getcwd()) for entry in sys.path}
        self._py_driver_sys_path = [path for path in self._py_driver_sys_path if os.path.realpath(path) in own]
        serialized: Any = super()._serialize()
        return serialized


def connect(address: str | None = None, min_cpus: int = 1, show_workers: bool = False) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS; without an address, start Ray on this machine, on loopback.

    A session started here offers at least `min_cpus` CPUs, so that two training workers also fit on one core.
    With `show_workers` the output of workers is printed here too, for a caller that sends it to a log.
    Returns True if the cluster is shared with others. Raises UserError, within seconds, if no cluster answers at the
    address.
    """
    named = named_address(address)
    shared = named is not None
    if ray.is_initialized():
        return shared
    common: dict[str, Any] = {"log_to_driver": show_workers, "logging_level": logging.ERROR, "namespace": "edt"}
    if not (named or "").startswith("ray://"):  # a Ray Client server makes the job's configuration itself
        common["job_config"] = _JobConfig()
    if named is None:
        cpus = max(os.cpu_count() or 1, min_cpus)
        # "local" never joins a cluster that `ray start` left on this machine.
        with on_loopback(), term_kept():
            ray.init(
                "local",
                num_cpus=cpus,
                resources={_OWN: 1},
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **common,
            )
        return False
    check_answers(named)
    try:
        with term_kept():
            ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"the Ray cluster at {named} answers, but cannot be joined: {first_line(error)}. Use the cluster's "
            "versions of Ray and Python, and run the command on one of its machines (from elsewhere, use edt submit)"
        ) from error
    return True


def start_beside(target: type, **arguments: Any) -> Any:
    """Start an actor that takes no CPU, on the node of this process: on a worker node it would be lost with the node.

    The affinity is hard. With a soft one Ray puts an actor that takes no CPU on any node.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(target).options(num_cpus=0, scheduling_strategy=here).remote(**arguments)


def is_own() -> bool:
    """Whether `connect` started this session: all of it is on this machine, on loopback."""
    return _OWN in ray.cluster_resources()


def require(stage: str, **resources: float) -> None:
    """Raise UserError if a session started here can never provide a stage's resources: it would wait forever.

    A shared cluster may grow, and Ray itself shows there which work waits for resources.
    """
    available = ray.cluster_resources()
    if _OWN not in available:
        return
    for resource, number in resources.items():
        if number > available.get(resource, 0):
            raise UserError(
                f"{stage} needs {number:g} {resource} at once, but this machine offers {available.get(resource, 0):g}; "
                "lower the resources in the configuration, or join a cluster with RAY_ADDRESS or --address"
            )


def room_for(most: int, **resources: float) -> int:
    """How many workers with these resources, at most `most`, fit on what nobody uses or waits for at this moment.

    0 while a placement group waits for its place, as the workers of a training do.
    """
    groups: Any = ray.util.placement_group_table()
    if any(group["state"] in ("PENDING", "RESCHEDULING") for group in groups.values()):
        return 0
    free = ray.available_resources()
    return min([most, *(int(free.get(name, 0) // number) for name, number in resources.items() if number)])


def cause_of(error: BaseException) -> BaseException:
    """The error that a job raised, unwrapped from the errors of Ray and Ray Train.

    If several workers failed, a UserError or Stopped is preferred: when one worker gives up, the others often fail as
    a consequence.
    """
    current = error
    while not _is_explicit(current):
        failures = list((getattr(current, "worker_failures", None) or {}).values())
        if failures:
            causes = [cause_of(failure) for failure in failures]
            return next(filter(_is_explicit, causes), causes[0])
        inner = getattr(current, "cause", None) or current.__cause__
        if not isinstance(inner, BaseException) or inner is current:
            return current
        current = inner
    return current


def _is_explicit(error: BaseException) -> bool:
    """Whether the error has a message for the user, and is not a wrapper of the same class that Ray made."""
    return isinstance(error, UserError | Stopped) and not isinstance(error, ray.exceptions.RayError)


def use_threads(num_cpus: float) -> None:
    """Give torch as many threads as the task has CPUs: more threads only slow each other down.

    Every task that computes calls this. Ray reuses processes, so the thread count would otherwise be that of the
    previous task, and the last bit of the results depends on it.
    """
    import torch

    torch.set_num_threads(max(1, int(num_cpus)))


def free_place_of(actor_id: str | None) -> None:
    """Release the resources of a lost Ray Train controller's workers: new workers would wait for them forever.

    Ray Train's own cleaner asks the dashboard whether the controller is alive, and a session started here has no
    dashboard. Ray has no public call that returns the creator of a placement group.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for data in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        if group.creator_actor_id.hex() == actor_id:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
