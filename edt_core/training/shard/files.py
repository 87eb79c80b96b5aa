"""Safetensors files that all ranks write together, each the tensors that it has.

The bytes are those of `safetensors.torch.save_file`, also of tensors of which each rank has some rows. Rank 0
creates a file with its header and its full size. A rank that sees the file, on the same machine or a shared file
system, writes its tensors into it; others, and all other machines if the store is remote, send theirs to rank 0. The
ranks' writing threads have a process group of their own, so that they do not interfere with the training.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from edt_core.training.ranks import Ranks
from edt_core.training.shard.rows import Rows

# In the order of the format's library: tensors of the last of these come first in a file.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES.values())}
_ALIGNMENT = 8  # of the header's length
RowsOf = Callable[[str, Tensor], Rows | None]
Save = Callable[[Mapping[str, Tensor], Path | None, Mapping[str, str] | None], None]


@dataclass(frozen=True)
class Described:
    """A tensor of a file without its values: `dtype` is the format's name of it.

    A rank has `own` of its `nbytes` bytes, from `start` on: all of them, or those of some rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int
    own: int

    @classmethod
    def of(cls, name: str, value: Tensor, rows: Rows | None = None) -> Described:
        if rows is None:
            return cls(name, _DTYPES[value.dtype], tuple(value.shape), value.nbytes, 0, value.nbytes)
        row = prod(rows.shape[1:]) * value.element_size()
        return cls(name, _DTYPES[value.dtype], rows.shape, row * rows.shape[0], row * rows.start, value.nbytes)


@dataclass(frozen=True)
class Layout:
    """The beginning of a safetensors file, the place of each tensor in bytes from its start, and its size."""

    header: bytes
    places: Mapping[str, int]
    size: int

    @classmethod
    def of(cls, tensors: Sequence[Described], metadata: Mapping[str, str] | None = None) -> Layout:
        """The layout of a file of these tensors, or parts of them: by dtype, the widest first, then by name."""
        entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        offsets, end = dict[str, int](), 0
        whole = {tensor.name: tensor for tensor in tensors}.values()
        for tensor in sorted(whole, key=lambda tensor: (-_ORDER[tensor.dtype], tensor.name)):
            offsets[tensor.name], start = end, end
            end += tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        return cls(header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end)


def save_alone(tensors: Mapping[str, Tensor], path: Path | None, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of which this process has all tensors."""
    assert path is not None, "only a file that ranks write together is without a path on some of them"
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))


class JointFiles:
    """Writes files together with all other ranks. To be made by all ranks at once, in the thread of the training."""

    def __init__(self, ranks: Ranks, timeout_s: int, rows_of: RowsOf | None = None) -> None:
        """`rows_of`: the rows that this rank has of a tensor by its name in a file, None for all; by default all."""
        self.ranks, self._rows_of = ranks, rows_of or _all
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def close(self) -> None:
        """Free the process group, after the last file."""
        dist.destroy_process_group(self._group)

    def save(self, tensors: Mapping[str, Tensor], path: Path | None, metadata: Mapping[str, str] | None = None) -> None:
        """Write a file of all ranks' tensors, in host memory. Collective: the same files in the same order.

        Only rank 0's `path` counts, and `metadata` is the same on every rank. Raises OSError on every rank if one of
        them could not write its part.
        """
        own = [Described.of(name, value, self._rows_of(name, value)) for name, value in tensors.items()]
        mine = path, own
        gathered: list[tuple[Path, list[Described]]] = self._gather(mine)
        path = gathered[0][0]
        layout = Layout.of([tensor for _, described in gathered for tensor in described], metadata)
        problem = self._create(path, layout) if self.ranks.rank == 0 else None
        self._raise_any(problem)
        sees = self._gather(is_visible(path))
        if sees[self.ranks.rank]:
            problem = self._write_own(path, layout, own, tensors)
        else:
            self._send(tensors)
        if self.ranks.rank == 0:
            for rank in (rank for rank, is_visible in enumerate(sees) if not is_visible):
                problem = self._receive(rank, gathered[rank][1], path, layout) or problem
        self._raise_any(problem)

    def _create(self, path: Path, layout: Layout) -> OSError | None:
        try:
            with path.open("wb") as file:
                file.write(layout.header)
                file.truncate(layout.size)
        except OSError as error:
            return error
        return None

    def _write_own(
        self, path: Path, layout: Layout, own: Sequence[Described], tensors: Mapping[str, Tensor]
    ) -> OSError | None:
        try:
            with path.open("r+b") as file:
                for tensor in own:
                    write_at(file, layout.places[tensor.name] + tensor.start, tensors[tensor.name])
                os.fsync(file.fileno())
        except OSError as error:
            return error
        return None

    def _send(self, tensors: Mapping[str, Tensor]) -> None:
        for value in tensors.values():
            dist.send(_bytes(value), dst=0, group=self._group)

    def _receive(self, rank: int, described: Sequence[Described], path: Path, layout: Layout) -> OSError | None:
        """Write another rank's tensors. After an error the rest is received all the same: its sender waits."""
        problem = None
        with path.open("r+b") as file:
            for tensor in described:
                value = torch.empty(tensor.own, dtype=torch.uint8)
                dist.recv(value, src=rank, group=self._group)
                try:
                    write_at(file, layout.places[tensor.name] + tensor.start, value)
                except OSError as error:
                    problem = error
        return problem

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _raise_any(self, problem: OSError | None) -> None:
        """Raise the first rank's problem on every rank."""
        problems = self._gather(None if problem is None else (problem.errno or errno.EIO, str(problem)))
        for rank, found in enumerate(problems):
            if found is not None:
                raise OSError(found[0], f"rank {rank} could not write its part of the file: {found[1]}")


def _all(name: str, value: Tensor) -> Rows | None:
    return None


def is_visible(path: Path) -> bool:
    """Whether this rank sees a file of rank 0, whose name no other file has."""
    return path.exists()


def write_at(file: BinaryIO, place: int, value: Tensor) -> None:
    """Write a tensor's bytes at a place of a file."""
    data = memoryview(_bytes(value).numpy().data)
    while data:
        written = os.pwrite(file.fileno(), data, place)
        data, place = data[written:], place + written


def _bytes(value: Tensor) -> Tensor:
    """A tensor's memory, uint8 [n]."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)
