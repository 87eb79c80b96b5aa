"""The Ray session: join the cluster that is named, or start one on this machine."""

import logging
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import ray
import ray.exceptions
import ray.job_config

from edt_core.errors import Stopped, UserError
from jobs.runtime.cluster_address import check_answers, first_line, named_address
from jobs.runtime.loopback import on_loopback
from jobs.runtime.termination import term_kept

_OWN = "edt_own_session"  # a resource that marks a session that `connect` started
MAX_RETRIES = 8  # of a task or actor whose process was lost: nodes go, but what always crashes must end
_NO_JOB = -1  # for counting the actors that are lost before they have done anything
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

    An item goes to an actor that has its place and has room, so one placed actor is enough to finish: pools that share
    a full cluster do not wait for each other, nor for a node that does not come back. The items of a lost actor are
    done by an actor that has room, and another actor takes its place when there is one. With a `depth` above 1 an actor
    has that many items at once, each in a thread: their stages overlap.
    Raises what `work` raises, and RayActorError for an item whose actor was lost more than MAX_RETRIES times.
    """
    pool = _Pool(lambda: ray.remote(_Holder).options(max_concurrency=depth, **options).remote(make, arguments), depth)
    queue = deque(enumerate(items))
    lost: Counter[int] = Counter()
    try:
        for _ in range(min(size, len(queue))):
            pool.start()
        while queue or pool.working:
            while queue and pool.room:
                pool.give(queue.popleft())
            ref = pool.first(wants_room=bool(queue))
            try:
                result = ray.get(ref)
            except ray.exceptions.RayActorError:
                jobs = pool.lose(ref)
                queue.extendleft(reversed(jobs))
                lost.update([number for number, _ in jobs] or [_NO_JOB])
                if max(lost.values()) > MAX_RETRIES:
                    raise
                pool.start()
                continue
            if (job := pool.done(ref)) is not None:
                yield job[1], result
    finally:
        pool.close()


class _Pool:
    """Actors, where each has its place, and which jobs (number, item) they have; `depth` at most at once."""

    def __init__(self, make: Callable[[], Any], depth: int) -> None:
        self.make, self.depth = make, depth
        self.placing: dict[Any, Any] = {}  # reference -> actor that has no place yet
        self.room: deque[Any] = deque()  # placed actors, once for each further job that they can take
        self.working: dict[Any, tuple[tuple[int, Any], Any]] = {}  # reference -> (job, actor)

    def start(self) -> None:
        actor = self.make()
        self.placing[actor.ready.remote()] = actor

    def give(self, job: tuple[int, Any]) -> None:
        actor = self.room.popleft()
        self.working[actor.work.remote(job[1])] = (job, actor)

    def first(self, wants_room: bool) -> Any:
        """A reference that is answered, or whose actor is lost: of a job, or of a place where one is wanted."""
        (ref,), _ = ray.wait([*self.working, *(self.placing if wants_room else ())], num_returns=1)
        return ref

    def done(self, ref: Any) -> tuple[int, Any] | None:
        """The job that is done, None where an actor has come to its place; either makes room."""
        if ref in self.working:
            job, actor = self.working.pop(ref)
            self.room.append(actor)
            return job
        self.room.extend([self.placing.pop(ref)] * self.depth)
        return None

    def lose(self, ref: Any) -> list[tuple[int, Any]]:
        """Forget the actor of a reference; returns the jobs that it had."""
        actor = self.working[ref][1] if ref in self.working else self.placing.pop(ref)
        ray.kill(actor)  # one that is out of reach only must not go on
        jobs = {other: job for other, (job, holder) in self.working.items() if holder is actor}
        for other in jobs:
            del self.working[other]
        self.room = deque(holder for holder in self.room if holder is not actor)
        return list(jobs.values())

    def close(self) -> None:
        for actor in {*self.placing.values(), *self.room, *(actor for _, actor in self.working.values())}:
            ray.kill(actor)
