"""The Ray session: join the cluster that is named, or start one on this machine."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import ray
import ray.exceptions

from edt_core.errors import Stopped, UserError

_OWN = "edt_own_session"  # a resource that marks a session that `connect` started
MAX_RETRIES = 8  # of a task or actor whose process was lost: nodes go, but what always crashes must end
_OBJECT_STORE_BYTES = 512 << 20  # artifacts go through the store on disk; Ray's objects here are small


def connect(address: str | None = None, min_cpus: int = 1) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS; with neither, start Ray on this machine, on loopback.

    A session of our own offers at least `min_cpus` CPUs, so that two training workers fit on one core as well.
    Returns True where the cluster is shared with others. Raises UserError where there is none at the address.
    """
    shared = bool(address or os.environ.get("RAY_ADDRESS"))
    if ray.is_initialized():
        return shared
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "edt"}
    if not shared:
        cpus = max(os.cpu_count() or 1, min_cpus)
        # "local": never a cluster that `ray start` left on this machine.
        ray.init(
            "local",
            num_cpus=cpus,
            resources={_OWN: 1},
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            **quiet,
        )
        return False
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        where = address or os.environ["RAY_ADDRESS"]
        raise UserError(f"no Ray cluster answers at {where}: {error}; start one, or leave the address out") from error
    return True


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


def finished(refs: Sequence[Any]) -> Generator[Any, None, None]:
    """Yield references as their tasks finish. What is left when the iterator is closed is cancelled."""
    pending = list(refs)
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            yield from done
    finally:
        for ref in pending:
            ray.cancel(ref)


class _Holder:
    """A Ray actor around a worker that is made in its first call: an error while loading reaches the caller whole."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.make, self.arguments = make, arguments
        self.worker: Any = None
        self._making = threading.Lock()

    def ready(self) -> None:
        """Answers once the actor has its place on the cluster."""

    def work(self, item: Any) -> Any:
        with self._making:  # of several items at once the first loads, and the others wait for it
            if self.worker is None:
                self.worker = self.make(*self.arguments)
        return self.worker.work(item)


def pooled(
    make: Callable[..., Any], size: int, items: Sequence[Any], *arguments: Any, depth: int = 1, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, `make(*arguments).work(item)`) as they finish, from up to `size` actors that load once.

    An item goes to an actor that has its place and is idle, so one placed actor is enough to finish: pools that share
    a full cluster do not wait for each other. A lost actor is started again and its items done again. With a `depth`
    above 1 an actor has that many items at once, each in a thread: their stages overlap.
    """
    options = {"max_restarts": MAX_RETRIES, "max_task_retries": MAX_RETRIES, "max_concurrency": depth, **options}
    actors: list[Any] = [
        ray.remote(_Holder).options(**options).remote(make, arguments) for _ in range(min(size, len(items)))
    ]
    queue = deque(items)
    placing = {actor.ready.remote(): actor for actor in actors}
    working: dict[Any, tuple[Any, Any]] = {}  # reference -> (item, actor)
    try:
        while queue or working:
            (ref,), _ = ray.wait([*working, *(placing if queue else ())], num_returns=1)
            result = ray.get(ref)
            if ref in working:
                room, (item, actor) = 1, working.pop(ref)
            else:
                room, item, actor = depth, None, placing.pop(ref)
            for _ in range(min(room, len(queue))):
                following = queue.popleft()
                working[actor.work.remote(following)] = (following, actor)
            if item is not None:
                yield item, result
    finally:
        for actor in actors:
            ray.kill(actor)
