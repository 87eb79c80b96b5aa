"""The workers of a training and their communication: gradients, losses, and decisions of rank 0."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This worker among `world_size`, and its device. More than one worker requires torch's process group."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def wrap(self, model: nn.Module, gradient_dtype: Literal["fp32", "bf16"] = "fp32") -> nn.Module:
        """The model with a backward pass that sums gradients over all ranks; its `no_sync()` defers that.

        With `gradient_dtype` bf16 the gradients are rounded to bfloat16 for the exchange, which sums in that precision.
        """
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device] if self.device.type == "cuda" else None
        # DDP rebuilds its buckets after a process's first step unless find_unused_parameters is set. With three ranks
        # or more, the order of summation of gloo, and of a ring of NCCL, depends on an element's place in its bucket,
        # so a resumed training would end with different bits. On GPUs it costs a wait of the host, so only where
        # deterministic algorithms are asked for.
        exact = self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        fixed_layout = exact and self.world_size > 2
        with warnings.catch_warnings():  # torch 2.13 renamed broadcast_buffers; 2.11 does not have the new name
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(
                model,
                device_ids=ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=fixed_layout,
            )
        # Losses are already divided by the global batch size: gradients of ranks are summed, not averaged.
        wrapped.register_comm_hook(None, _rounded_sum if gradient_dtype == "bf16" else _sum)
        return wrapped

    def gather(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """float32 [k, sum(sizes)] on the device: [k, sizes[rank]] of each rank, concatenated by rank. Collective."""
        if self.world_size == 1:
            return values
        widest = max(sizes)
        padded = nn.functional.pad(values, (0, widest - values.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def wait(self) -> None:
        """Wait until every rank has called this. Collective."""
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


def _rounded_sum(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """As `_sum`, in bfloat16. torch's own hook for that averages, and its wrapper for other hooks refuses gloo."""
    gradients = bucket.buffer()
    work: Any = dist.all_reduce(gradients.to(torch.bfloat16), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: gradients.copy_(done.value()[0]))
    return future
