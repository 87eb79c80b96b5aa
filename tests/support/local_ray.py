"""Ray's calls done in this process, each at once: for tests of what the jobs make, not of how Ray makes it.

Each task and each actor of Ray is a process that imports torch, a session and a Ray Train job cost seconds more.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest


class Reference:
    """What a call gave or raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: Exception | None = None
        try:
            self.value = call()
        except Exception as error:
            self.error = error


class Actor:
    """A handle whose methods have `remote`."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> "Remote":
        return Remote(getattr(self._worker, name))


class Remote:
    """A function, class or method with `remote`."""

    def __init__(self, target: Callable[..., Any]) -> None:
        self.target = target

    def options(self, **_: object) -> "Remote":
        return self

    def remote(self, *arguments: Any, **named: Any) -> Any:
        if isinstance(self.target, type):
            return Actor(self.target(*arguments, **named))
        return Reference(lambda: self.target(*arguments, **named))


class Trainer:
    """A Ray Train job of one worker. It raises what the worker raises, and starts none again."""

    def __init__(self, config: object, job: dict[str, Any], name: str) -> None:
        self.job = job

    def fit(self) -> None:
        from jobs import train

        train._worker(self.job)


class _Worker:
    """Ray Train's context in the only worker."""

    def get_world_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1


def _remote(*target: Any, **_: object) -> Any:
    return Remote(*target) if target else Remote


def _get(reference: Reference) -> Any:
    if reference.error is not None:
        raise reference.error
    return reference.value


def _wait(references: Sequence[Reference], num_returns: int = 1, timeout: float | None = None) -> Any:
    return references[:num_returns], references[num_returns:]


@contextmanager
def local_ray() -> Iterator[None]:
    """Inside, there is a Ray session to all appearance. Ray Train is part of it where its modules are imported."""
    import ray
    import torch

    calls: dict[str, Any] = {
        "remote": _remote,
        "get": _get,
        "wait": _wait,
        "kill": lambda actor: None,
        "cancel": lambda reference: None,
        "is_initialized": lambda: True,
        "cluster_resources": dict,
    }
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, call in calls.items():
            patch.setattr(ray, name, call)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield
    torch.set_num_threads(threads)


@contextmanager
def local_ray_train() -> Iterator[None]:
    """Inside, what `jobs.train` leaves to Ray Train is done here by one worker."""
    import ray.train
    import ray.train.torch
    import torch

    from jobs import train

    with local_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_trainer", Trainer)
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)  # measured for a third of a second
        patch.setattr(ray.train, "get_context", _Worker)
        patch.setattr(ray.train, "get_preemption_info", lambda: None)
        patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
        yield
