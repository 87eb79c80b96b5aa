"""Ray's calls done in this process, each at once: for tests of what is made, not of how Ray makes it.

Each task and each actor of Ray is a process that imports torch; a session and a Ray Train job cost seconds more. What a
call gets and gives is pickled here too, so that what cannot go to a worker fails, and nobody changes what is another's.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest

_ACTORS: "WeakValueDictionary[int, Actor]" = WeakValueDictionary()


class Reference:
    """What a call gave or raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: Exception | None = None
        try:
            self.value = _sent(call())
        except Exception as error:
            self.error = error

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


def _got(references: "Reference | Sequence[Reference]") -> Any:
    """What one call gave, or a list of what several gave."""
    return references.get() if isinstance(references, Reference) else [each.get() for each in references]


class Actor:
    """A handle whose methods have `remote`; one call at a time. Pickled, it stays the handle of the same worker."""

    def __init__(self, worker: Any) -> None:
        self._worker, self._turn = worker, threading.RLock()
        _ACTORS[id(self)] = self

    def __reduce__(self) -> Any:
        return _actor, (id(self),)

    def __getattr__(self, name: str) -> "Remote":
        return Remote(getattr(self._worker, name), self._turn)


def _actor(number: int) -> Actor:
    return _ACTORS[number]


class Remote:
    """A function, class or method with `remote`."""

    def __init__(self, target: Callable[..., Any], turn: "threading.RLock | None" = None) -> None:
        self.target, self.turn = target, turn or threading.RLock()

    def options(self, **_: object) -> "Remote":
        return self

    def remote(self, *arguments: Any, **named: Any) -> Any:
        def call() -> Any:
            here = [item.get() if isinstance(item, Reference) else _sent(item) for item in arguments]
            with self.turn:
                return self.target(*here, **_sent(named))

        return Actor(call()) if isinstance(self.target, type) else Reference(call)


class Trainer:
    """A Ray Train job of one worker. It raises what the worker raises, and starts none again."""

    def __init__(self, config: object, job: dict[str, Any], name: str) -> None:
        self.job = job

    def fit(self) -> None:
        from jobs.stages import train

        train._worker(self.job)


class _Worker:
    """Ray Train's context in the only worker."""

    def get_world_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1

    def get_local_rank(self) -> int:
        return 0

    def get_local_world_size(self) -> int:
        return 1


def _remote(*target: Any, **_: object) -> Any:
    return Remote(*target) if target else Remote


def _sent(value: Any) -> Any:
    """What arrives of it in another process."""
    from ray import cloudpickle

    return cloudpickle.loads(cloudpickle.dumps(value))


def _wait(references: Sequence[Reference], num_returns: int = 1, timeout: float | None = None) -> Any:
    return references[:num_returns], references[num_returns:]


@contextmanager
def local_ray() -> Iterator[None]:
    """Inside, there is a Ray session to all appearance. Ray Train is part of it where its modules are imported.

    Stages get no threads for their CPUs: the other core has tests of another process, and two threads of which one
    waits for a core took 44 s of processor time for a fit that takes one thread 2 s.
    """
    import ray
    import torch

    calls: dict[str, Any] = {
        "remote": _remote,
        "get": _got,
        "wait": _wait,
        "kill": lambda actor: None,
        "cancel": lambda reference: None,
        "is_initialized": lambda: True,
        "cluster_resources": dict,
        "available_resources": lambda: {"CPU": 2.0},
        "get_runtime_context": lambda: SimpleNamespace(get_node_id=lambda: "0" * 56),
    }
    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda _number: None)
        for name, call in calls.items():
            patch.setattr(ray, name, call)
        patch.setattr(ray.util, "placement_group_table", dict)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield
    os.environ.clear()  # a step sets MLFLOW_TRACKING_URI for what it calls
    os.environ.update(environment)


@contextmanager
def local_ray_train() -> Iterator[None]:
    """Inside, what `jobs.stages.train` leaves to Ray Train is done here by one worker."""
    import ray.train
    import ray.train.torch
    import torch

    from jobs.stages import train

    with local_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_trainer", Trainer)
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)  # measured for a third of a second
        patch.setattr(ray.train, "get_context", _Worker)
        patch.setattr(ray.train, "get_preemption_info", lambda: None)
        patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
        yield
