"""The Ray session: join the cluster that is named, or start one on this machine."""

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

    Ray puts the driver's working directory first on the path of its workers, even where it is not on the driver's own.
    A `torch.py` among somebody's data would then run in every worker.
    """

    def _serialize(self) -> str:
        own = {os.path.realpath(entry or os.getcwd()) for entry in sys.path}
        self._py_driver_sys_path = [path for path in self._py_driver_sys_path if os.path.realpath(path) in own]
        serialized: Any = super()._serialize()
        return serialized


def connect(address: str | None = None, min_cpus: int = 1, show_workers: bool = False) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS; with neither, start Ray on this machine, on loopback.

    A session of our own offers at least `min_cpus` CPUs, so that two training workers fit on one core as well.
    With `show_workers` what workers print is printed here too: for a caller that sends all of that to a log.
    Returns True where the cluster is shared with others. Raises UserError, within seconds, where none answers at the
    address.
    """
    named = named_address(address)
    shared = named is not None
    if ray.is_initialized():
        return shared
    common: dict[str, Any] = {"log_to_driver": show_workers, "logging_level": logging.ERROR, "namespace": "edt"}
    if not (named or "").startswith("ray://"):  # there, the server makes the job's configuration
        common["job_config"] = _JobConfig()
    if named is None:
        cpus = max(os.cpu_count() or 1, min_cpus)
        # "local": never a cluster that `ray start` left on this machine.
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
            f"the Ray cluster at {named} answers, but cannot be joined: {first_line(error)}. Use its versions of Ray "
            "and Python, and start this on one of its machines (from elsewhere: edt submit)"
        ) from error
    return True


def start_beside(target: type, **arguments: Any) -> Any:
    """An actor that takes no CPU, on the node of this process: elsewhere it would be lost with a worker node.

    The affinity is hard. With a soft one Ray puts what takes no CPU on any node.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(target).options(num_cpus=0, scheduling_strategy=here).remote(**arguments)


def is_own() -> bool:
    """Whether the session is one that `connect` started: all of it on this machine, and on loopback."""
    return _OWN in ray.cluster_resources()


def require(stage: str, **wanted: float) -> None:
    """Raise UserError where a session of our own can never give what a stage wants: it would wait for ever.

    A cluster that others run may grow, and shows what waits for resources itself.
    """
    there = ray.cluster_resources()
    if _OWN not in there:
        return
    for kind, number in wanted.items():
        if number > there.get(kind, 0):
            raise UserError(
                f"{stage} wants {number:g} {kind} at once, this machine offers {there.get(kind, 0):g}; lower what the "
                "configuration asks for, or join a cluster by RAY_ADDRESS or --address"
            )


def cause_of(error: BaseException) -> BaseException:
    """The error that a job raised, out of what Ray and Ray Train wrapped around it.

    Of several workers' errors it is one that tells something, if there is one: when one worker gives up, the others
    often fail for want of it.
    """
    seen = error
    while not _is_told(seen):
        failures = list((getattr(seen, "worker_failures", None) or {}).values())
        if failures:
            causes = [cause_of(failure) for failure in failures]
            return next(filter(_is_told, causes), causes[0])
        inner = getattr(seen, "cause", None) or seen.__cause__
        if not isinstance(inner, BaseException) or inner is seen:
            return seen
        seen = inner
    return seen


def _is_told(error: BaseException) -> bool:
    """Whether it is an error with a message for a person, and not a wrapper that Ray made of the same class."""
    return isinstance(error, UserError | Stopped) and not isinstance(error, ray.exceptions.RayError)


def device_name(num_gpus: float) -> str:
    """Where a worker with this share of GPUs computes."""
    import torch

    return "cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu"


def use_threads(num_cpus: float) -> None:
    """Give torch as many threads as the task has CPUs: more only get in each other's way.

    Every task that computes calls this. Ray reuses processes, so the number would be that of the task before, and with
    it the last bit of the results.
    """
    import torch

    torch.set_num_threads(max(1, int(num_cpus)))


def free_place_of(actor_id: str | None) -> None:
    """Give back what the workers of a lost Ray Train controller hold: the next ones would wait for it, for ever.

    Ray Train's own cleaner asks the dashboard whether the controller lives, and a session of our own has none. There is
    no public call that tells who made a placement group.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for data in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        if group.creator_actor_id.hex() == actor_id:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
