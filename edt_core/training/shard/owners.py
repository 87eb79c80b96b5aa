"""Which rank owns which tensors of a training's state, as in the first stage of ZeRO (arXiv 1910.02054).

Every rank has all weights and, after the exchange, the whole gradient. The owner of a weight alone has the state of its
optimizer and its averages, updates them, and sends the new weight to the others. Tensors are owned whole, so an update
does the arithmetic that it would do without owners, and Muon has its matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from edt_core.models import ModelConfig, shadow
from edt_core.training.ranks import Ranks
from edt_core.training.shard.rows import row_share
from edt_core.training.speed.update import by_block

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

Value = TypeVar("Value")
_BUCKET_BYTES = 64 << 20  # sent at once, from one owner: the memory of an exchange


def owners_of(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The owner of each of the tensors, whose sizes are given, such that the largest share is small.

    A block stays together, so that one compiled update serves all blocks of a shape, and a message has many tensors.
    The largest blocks and single tensors are distributed first, each to the rank that has the least.
    """
    blocks = by_block(sizes)
    units = [[name] for name in blocks.pop("", [])] + list(blocks.values())
    loads, owners = [0] * ranks, dict[str, int]()
    for unit in sorted(units, key=lambda names: -sum(sizes[name] for name in names)):
        owner = loads.index(min(loads))
        loads[owner] += sum(sizes[name] for name in unit)
        owners |= dict.fromkeys(unit, owner)
    return owners


def largest_share(config: TrainConfig, model_config: ModelConfig) -> float:
    """The part of the optimizer's state and the averages that one worker has, at most; 1 if they are not divided.

    That of the fewest workers that the training may have.
    """
    workers = config.worker_range[0]
    if config.shard == "none" or workers == 1:
        return 1.0
    return row_share(model_config, workers) if config.shard == "full" else _largest_share(model_config, workers)


@lru_cache(maxsize=64)
def _largest_share(model_config: ModelConfig, workers: int) -> float:
    sizes = {name: value.numel() for name, value in shadow(model_config).state_dict().items()}
    loads = [0] * workers
    for name, owner in owners_of(sizes, workers).items():
        loads[owner] += sizes[name]
    return max(loads) / sum(loads)


@dataclass(frozen=True)
class Shards:
    """The owner of each tensor by name, and the ranks, of which this one may own some."""

    ranks: Ranks
    owners: Mapping[str, int]

    @classmethod
    def of(cls, ranks: Ranks, tensors: Mapping[str, Tensor]) -> Shards:
        """A division of these tensors, the same on every rank."""
        return cls(ranks, owners_of({name: value.numel() for name, value in tensors.items()}, ranks.world_size))

    def owns(self, name: str) -> bool:
        """Whether this rank owns a tensor."""
        return self.owners.get(name) == self.ranks.rank

    def own(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Those of the values by name that this rank owns."""
        return {name: value for name, value in values.items() if self.owns(name)}

    @torch.no_grad()
    def exchange(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every rank the owners' values of these tensors, in place. Collective."""
        for owner in range(self.ranks.world_size):
            owned = [value.detach() for name, value in tensors.items() if self.owners[name] == owner]
            for bucket in _buckets(owned):
                sent = torch.cat([value.reshape(-1) for value in bucket])
                dist.broadcast(sent, src=owner)
                if owner != self.ranks.rank:
                    parts = sent.split([value.numel() for value in bucket])
                    received = [part.view_as(value) for part, value in zip(parts, bucket, strict=True)]
                    torch._foreach_copy_(bucket, received)

    def whole(self, average: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An average with all of its tensors, of which each rank has its own; `like` has their shapes. Collective."""
        values = {name: average.get(name, _empty(value)) for name, value in like.items()}
        self.exchange(values)
        return values


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=torch.float32 if like.is_floating_point() else like.dtype, requires_grad=False)


def _buckets(tensors: Collection[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of one dtype, each list of a limited number of bytes or of one tensor."""
    bucket, size = list[Tensor](), 0
    for value in sorted(tensors, key=lambda value: str(value.dtype)):
        if bucket and (value.dtype != bucket[0].dtype or size + value.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(value)
        size += value.nbytes
    if bucket:
        yield bucket
