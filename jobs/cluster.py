"""The Ray session: join the cluster that is named, or start one on this machine."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

_OBJECT_STORE_BYTES = 512 << 20  # artifacts go through the store on disk; Ray's objects here are small


def connect(address: str | None = None, min_cpus: int = 1) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS; with neither, start Ray on this machine, on loopback.

    A session of our own offers at least `min_cpus` CPUs, so that two training workers fit on one core as well.
    Returns True where the cluster is shared with others.
    """
    shared = bool(address or os.environ.get("RAY_ADDRESS"))
    if ray.is_initialized():
        return shared
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "edt"}
    if shared:
        ray.init(address=address, **quiet)
    else:
        cpus = max(os.cpu_count() or 1, min_cpus)
        ray.init(num_cpus=cpus, object_store_memory=_OBJECT_STORE_BYTES, include_dashboard=False, **quiet)
    return shared


def device_name(num_gpus: float) -> str:
    """Where a worker with this share of GPUs computes."""
    import torch

    return "cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu"


def use_threads(num_cpus: float) -> None:
    """Give torch as many threads as the task has CPUs: more only get in each other's way."""
    import torch

    torch.set_num_threads(max(1, int(num_cpus)))


def map_in_order(actors: list[Any], work: Iterable[Any]) -> Iterator[Any]:
    """Call `actor.work.remote(item)` over a pool and yield results in order of the items. Idle actors take the next."""
    from ray.util import ActorPool

    yield from ActorPool(actors).map(lambda actor, item: actor.work.remote(item), list(work))


class _Holder:
    """A Ray actor around a worker that is made in its first call: an error while loading reaches the caller whole."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.make, self.arguments = make, arguments
        self.worker: Any = None

    def work(self, item: Any) -> Any:
        if self.worker is None:
            self.worker = self.make(*self.arguments)
        return self.worker.work(item)


@contextmanager
def pool(make: Callable[..., Any], size: int, *arguments: Any, **options: Any) -> Iterator[list[Any]]:
    """`size` actors, each holding a `make(*arguments)` that is loaded once; their processes end with the block."""
    actors: list[Any] = [ray.remote(_Holder).options(**options).remote(make, arguments) for _ in range(size)]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)
