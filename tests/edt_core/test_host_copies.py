"""Checkpoints of a GPU: copied through a bounded ring of page-locked memory into ordinary memory, bit by bit."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from edt_core.files import host_copies
from edt_core.files.host_copies import RING_BYTES, PinnedRing, Wait
from edt_core.files.tensor_files import load_tensors
from edt_core.training.checkpoint import Checkpoint, HostMemory

RNG = torch.Generator().manual_seed(0)


class Gpu:
    """A device whose copies arrive when they are waited for, in the order of its stream, and no earlier."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.most = 0

    def pinned(self, size: int) -> Tensor:
        self.allocated.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    def start(self, target: Tensor, source: Tensor) -> Wait:
        copy = (target, source)
        self.waiting.append(copy)
        self.most = max(self.most, len(self.waiting))

        def wait() -> None:
            while any(each is copy for each in self.waiting):
                done_target, done_source = self.waiting.pop(0)
                done_target.copy_(done_source)

        return wait

    def ring(self, slots: int, slot_bytes: int) -> PinnedRing:
        return PinnedRing(slots, slot_bytes, self.pinned, self.start)


TENSORS: dict[str, Tensor] = {
    "large": torch.randn(7, 33, generator=RNG),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "flags": torch.rand(13, generator=RNG) > 0.5,
    "long": torch.arange(-9, 40),
    "half": torch.randn(5, 5, generator=RNG).to(torch.bfloat16),
    "channels last": torch.randn(2, 3, 4, 5, generator=RNG).to(memory_format=torch.channels_last),
    "transposed": torch.randn(6, 4, generator=RNG).t(),
}


@pytest.mark.parametrize(("slots", "slot_bytes"), [(1, 8), (2, 16), (3, 64), (4, 1 << 20)])
def test_tensors_of_every_kind_arrive_whole(slots: int, slot_bytes: int) -> None:
    gpu = Gpu()
    ring = gpu.ring(slots, slot_bytes)
    targets = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        ring.copy(targets[name], tensor)
    ring.finish()
    for name, tensor in TENSORS.items():
        assert torch.equal(targets[name], tensor), name
    assert not gpu.waiting
    assert gpu.allocated == [slot_bytes] * min(slots, len(gpu.allocated))
    assert gpu.most <= slots
    if slots > 1:
        assert gpu.most > 1  # one slot is filled while another one is emptied


def test_page_locked_memory_is_bounded_and_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        sizes.append(size)
        return torch.zeros(size, dtype=dtype)

    whole, gpu = torch.arange(40 << 20, dtype=torch.int64).view(torch.uint8), Gpu()
    ring = PinnedRing(start=gpu.start)
    target = torch.empty_like(whole)
    monkeypatch.setattr(host_copies.torch, "empty", empty)
    for _ in range(2):
        ring.copy(target, whole)
        ring.finish()
    monkeypatch.undo()
    assert torch.equal(target, whole)
    assert sum(sizes) == 64 << 20
    assert len(whole) == 320 << 20


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def checkpoint(tensors: Mapping[str, Tensor], step: int) -> Checkpoint:
    return Checkpoint(step=step, tensors={"file": tensors}, state={}, model_config={}, score=None)


def test_a_checkpoint_s_copies_are_those_of_its_step() -> None:
    """Buffers are used again, later steps do not change them, and CPU tensors take no page-locked memory."""
    gpu = Gpu()
    memory = HostMemory(gpu.ring(2, 24))
    values: dict[str, Any] = {name: tensor.clone().as_subclass(OnGpu) for name, tensor in TENSORS.items()}
    first = memory.copy(checkpoint({**values, "cpu": torch.ones(3)}, 1)).tensors["file"]
    for value in values.values():
        value.zero_()
    assert all(torch.equal(first[name], tensor) for name, tensor in TENSORS.items())
    assert torch.equal(first["cpu"], torch.ones(3))
    second = memory.copy(checkpoint({**values, "cpu": torch.zeros(3)}, 2)).tensors["file"]
    assert all(second[name].data_ptr() == first[name].data_ptr() for name in first)
    assert not any(bool(value.any()) for value in second.values())
    assert len(gpu.allocated) == 2

    before = len(gpu.allocated)
    HostMemory(gpu.ring(2, 24)).copy(checkpoint({"cpu": torch.ones(100)}, 1))
    assert len(gpu.allocated) == before


STATUS = Path("/proc/self/status")
MIB = 1 << 20


def resident(kind: str) -> int:
    """Bytes of this process's memory: RssAnon, its own, or RssFile, mapped from files."""
    return next(int(line.split()[1]) << 10 for line in STATUS.read_text().splitlines() if line.startswith(f"{kind}:"))


@pytest.mark.skipif(not STATUS.exists(), reason="reads the memory of a process from Linux")
def test_writing_takes_no_second_copy_and_reading_maps_the_file(tmp_path: Path) -> None:
    """What `host_memory` assumes, and docs/cluster.md: 256 MiB in a file change the process's own memory little."""
    tensors = {str(number): torch.rand(8 << 20, generator=RNG) for number in range(8)}
    path, most, ended = tmp_path / "state.safetensors", [0], threading.Event()
    before = resident("RssAnon")

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        save_file(tensors, path)
    finally:
        ended.set()
        watcher.join()
    assert most[0] - before < 64 * MIB
    own, mapped = resident("RssAnon"), resident("RssFile")
    loaded = load_tensors(path)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert resident("RssAnon") - own < 64 * MIB
    assert resident("RssFile") - mapped > 192 * MIB


def test_the_ring_is_as_large_as_stated() -> None:
    gpu = Gpu()
    ring = PinnedRing(allocate=gpu.pinned, start=gpu.start)
    value = torch.rand(RING_BYTES // 2, generator=RNG)
    target = torch.empty_like(value)
    ring.copy(target, value)
    ring.finish()
    assert torch.equal(target, value)
    assert sum(gpu.allocated) == RING_BYTES
