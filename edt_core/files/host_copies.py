"""Copies of GPU tensors into ordinary host memory, through a small ring of page-locked memory.

Page-locked memory makes copies fast, but the machine cannot swap it or use it for anything else, and PyTorch rounds
each block up to a power of two. So only the ring is page-locked, whatever the size of the tensors.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Wait = Callable[[], None]
_SLOTS, _SLOT_BYTES = 4, 16 << 20
RING_BYTES = _SLOTS * _SLOT_BYTES  # page-locked memory of a ring


def pinned(size: int) -> Tensor:
    """Page-locked memory, uint8 [size]."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def started_copy(target: Tensor, source: Tensor) -> Wait:
    """Start a copy from a GPU to page-locked memory; the result waits for its end."""
    target.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(source.device))
    return event.synchronize


class PinnedRing:
    """A ring of page-locked slots: while one is copied to its destination, the GPU fills the others.

    `allocate(bytes)` returns a slot, uint8 [bytes]; `start(target, source)` starts a copy and returns a function that
    waits for it. A slot is allocated when it is first needed.
    """

    def __init__(
        self,
        slots: int = _SLOTS,
        slot_bytes: int = _SLOT_BYTES,
        allocate: Callable[[int], Tensor] = pinned,
        start: Callable[[Tensor, Tensor], Wait] = started_copy,
    ) -> None:
        self._slots, self._slot_bytes = slots, slot_bytes
        self._allocate, self._start = allocate, start
        self._free: deque[Tensor] = deque()
        self._pending: deque[tuple[Tensor, Tensor, Wait]] = deque()  # slot, destination, wait; the oldest first

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy `source` to `target` of the same shape and dtype, contiguous in host memory; valid after `finish`."""
        to, what = _bytes(target), _bytes(source.detach().contiguous())
        for start in range(0, what.numel(), self._slot_bytes):
            stop = min(start + self._slot_bytes, what.numel())
            slot = self._slot()
            wait = self._start(slot[: stop - start], what[start:stop])
            self._pending.append((slot, to[start:stop], wait))

    def finish(self) -> None:
        """Wait until all copies are at their destinations."""
        while self._pending:
            self._finish_oldest()

    def _slot(self) -> Tensor:
        if not self._free and len(self._pending) < self._slots:
            return self._allocate(self._slot_bytes)
        if not self._free:
            self._finish_oldest()
        return self._free.popleft()

    def _finish_oldest(self) -> None:
        slot, target, wait = self._pending.popleft()
        wait()
        target.copy_(slot[: target.numel()])
        self._free.append(slot)


def _bytes(tensor: Tensor) -> Tensor:
    """A view uint8 [n] of a contiguous tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8)
