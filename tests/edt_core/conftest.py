"""Fixtures of the tests of the training loop: latents, a machine that is not measured, one thread, and none left."""

import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from edt_core.data.latents import LatentDataset
from edt_core.store.artifact import Artifact
from tests.support.gloo import end_server


@pytest.fixture(scope="module")
def dataset(latents_artifact: Artifact) -> LatentDataset:
    return LatentDataset(latents_artifact.paths("*.arrow"))


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Without measuring the machine, but where that is the test."""
    if "figures" not in request.node.name:
        monkeypatch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "edt-prefetch"]


@pytest.fixture(scope="session")
def forks() -> Iterator[None]:
    """One process forks the ranks of every module that has them; so pytest-xdist gives all of these to one process."""
    yield
    end_server()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
