"""Work spread over Ray: tasks as they finish, and pools of actors whose lost members are replaced."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import ray
import ray.exceptions

MAX_RETRIES = 8  # of a task or actor whose process was lost: nodes go, but what always crashes must end
_NO_JOB = -1  # for counting the actors that are lost before they have done anything


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
        ray.kill(actor)  # one that is only out of reach must not continue
        jobs = {other: job for other, (job, holder) in self.working.items() if holder is actor}
        for other in jobs:
            del self.working[other]
        self.room = deque(holder for holder in self.room if holder is not actor)
        return list(jobs.values())

    def close(self) -> None:
        for actor in {*self.placing.values(), *self.room, *(actor for _, actor in self.working.values())}:
            ray.kill(actor)
