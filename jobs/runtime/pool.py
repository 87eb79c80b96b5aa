"""Distribute work over Ray: tasks in order of completion, and pools of actors that replace lost actors."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import ray
import ray.exceptions

MAX_RETRIES = 8  # of a task or actor whose process was lost: nodes may leave, but work that always crashes must end
_NO_JOB = -1  # counts actors that are lost before they get an item


def finished(refs: Sequence[Any]) -> Generator[Any, None, None]:
    """Yield references as their tasks finish. Closing the iterator cancels the remaining tasks."""
    pending = list(refs)
    del refs  # a result is kept as long as its reference
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            yield from done
    finally:
        for ref in pending:
            ray.cancel(ref)


class _Holder:
    """A Ray actor that makes its worker in the first call, so that a loading error reaches the caller in full."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.make, self.arguments = make, arguments
        self.worker: Any = None
        self._load_lock = threading.Lock()

    def ready(self) -> None:
        """Return once the actor is placed on the cluster."""

    def work(self, item: Any) -> Any:
        with self._load_lock:  # of several items at once, the first one loads and the others wait
            if self.worker is None:
                self.worker = self.make(*self.arguments)
        return self.worker.work(item)


def pooled(
    make: Callable[..., Any], size: int, items: Sequence[Any], *arguments: Any, depth: int = 1, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, `make(*arguments).work(item)`) in order of completion, from up to `size` actors that load once.

    An item goes to a placed actor that has room, so one placed actor is enough to finish: pools that share a full
    cluster do not wait for each other, nor for a node that does not come back. If an actor is lost, other actors do its
    items, and a new actor replaces it once the cluster has room. With a `depth` above 1 an actor works on that many
    items at once, each in a thread, so that their stages overlap.
    Raises what `work` raises, and RayActorError for an item whose actor was lost more than MAX_RETRIES times.
    """
    pool = _Pool(lambda: ray.remote(_Holder).options(max_concurrency=depth, **options).remote(make, arguments), depth)
    queue = deque(enumerate(items))
    losses: Counter[int] = Counter()
    try:
        for _ in range(min(size, len(queue))):
            pool.start()
        while queue or pool.working:
            while queue and pool.room:
                pool.assign(queue.popleft())
            ref = pool.next_ready(needs_room=bool(queue))
            try:
                result = ray.get(ref)
            except ray.exceptions.RayActorError:
                jobs = pool.remove(ref)
                queue.extendleft(reversed(jobs))
                losses.update([number for number, _ in jobs] or [_NO_JOB])
                if max(losses.values()) > MAX_RETRIES:
                    raise
                pool.start()
                continue
            if (job := pool.done(ref)) is not None:
                yield job[1], result
    finally:
        pool.close()


class _Pool:
    """Actors, placed or not, and the jobs (number, item) of each, at most `depth` at once."""

    def __init__(self, make: Callable[[], Any], depth: int) -> None:
        self.make, self.depth = make, depth
        self.placing: dict[Any, Any] = {}  # reference -> actor that is not placed yet
        self.room: deque[Any] = deque()  # placed actors, once for each further job that they can take
        self.working: dict[Any, tuple[tuple[int, Any], Any]] = {}  # reference -> (job, actor)

    def start(self) -> None:
        actor = self.make()
        self.placing[actor.ready.remote()] = actor

    def assign(self, job: tuple[int, Any]) -> None:
        actor = self.room.popleft()
        self.working[actor.work.remote(job[1])] = (job, actor)

    def next_ready(self, needs_room: bool) -> Any:
        """A reference of a job, or of a placement if room is needed, that is ready or whose actor is lost."""
        (ref,), _ = ray.wait([*self.working, *(self.placing if needs_room else ())], num_returns=1)
        return ref

    def done(self, ref: Any) -> tuple[int, Any] | None:
        """The finished job, or None if an actor was placed. Both make room."""
        if ref in self.working:
            job, actor = self.working.pop(ref)
            self.room.append(actor)
            return job
        self.room.extend([self.placing.pop(ref)] * self.depth)
        return None

    def remove(self, ref: Any) -> list[tuple[int, Any]]:
        """Remove the actor of a reference; return its jobs."""
        actor = self.working[ref][1] if ref in self.working else self.placing.pop(ref)
        ray.kill(actor)  # an unreachable actor must not continue
        jobs = {other: job for other, (job, holder) in self.working.items() if holder is actor}
        for other in jobs:
            del self.working[other]
        self.room = deque(holder for holder in self.room if holder is not actor)
        return list(jobs.values())

    def close(self) -> None:
        for actor in {*self.placing.values(), *self.room, *(actor for _, actor in self.working.values())}:
            ray.kill(actor)
