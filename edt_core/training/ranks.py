"""The workers of a training and what they tell each other: gradients, losses, and what rank 0 decides."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This worker among `world_size`, and its device; more than one need torch's process group to be there."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass adds up gradients over all ranks; `no_sync()` of it puts that off."""
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device] if self.device.type == "cuda" else None
        # After a process's first step DDP rebuilds its buckets, unless parameters may be unused. From three ranks
        # on gloo's order of summation depends on an element's place: a resumed training would end with other bits.
        fixed_layout = self.device.type == "cpu" and self.world_size > 2
        with warnings.catch_warnings():  # torch 2.13 has another name for broadcast_buffers, which 2.11 does not know
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(
                model,
                device_ids=ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=fixed_layout,
            )
        # The losses are divided by the global batch: what ranks of unequal shares bring is to be added, not averaged.
        wrapped.register_comm_hook(None, _sum)
        return wrapped

    def gather(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """float32 [k, sizes[rank]] of each rank, joined in order of rank: [k, sum(sizes)], on the device.

        Collective.
        """
        if self.world_size == 1:
            return values
        widest = max(sizes)
        padded = nn.functional.pad(values, (0, widest - values.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def wait(self) -> None:
        """Until every rank is here. Collective."""
        if self.world_size > 1:
            dist.barrier()

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank. Collective."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared.item())


def _sum(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the sum of a bucket of gradients over all ranks."""
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
