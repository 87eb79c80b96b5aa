"""All of a training's state divided by rows, as in the third stage of ZeRO (arXiv 1910.02054), by `fully_shard`.

Each rank has some rows of every weight, of its gradient, of its averages and of its optimizer's state. PyTorch gathers
the weights of one part of the model at a time, for its forward and again for its backward pass, and sums the rows of
its gradient. The optimizer and the averages see the own rows as ordinary tensors, so they compute what they would
compute with whole ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edt_core.models import ModelConfig, shadow
from edt_core.models.base import DiffusionTransformer
from edt_core.training.ranks import Ranks
from edt_core.training.speed.compiled import model_parts


@dataclass(frozen=True)
class Rows:
    """The rows that a rank has of a tensor of shape `shape`: `count`, from `start` on. The last ranks may have none."""

    shape: tuple[int, ...]
    start: int
    count: int

    @classmethod
    def of(cls, shape: tuple[int, ...], rank: int, ranks: int) -> Rows:
        """Those of one of `ranks`, as `torch.chunk` divides them."""
        most = -(-shape[0] // ranks)
        start = min(rank * most, shape[0])
        return cls(tuple(shape), start, min(most, shape[0] - start))

    def cut(self, whole: Tensor) -> Tensor:
        """The rows, of the whole tensor."""
        return whole[self.start : self.start + self.count]


@torch.no_grad()
def own_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, with this rank's rows of what is divided. It shares the module's memory."""
    return {name: _own(value) for name, value in module.state_dict().items()}


@torch.no_grad()
def load_own(module: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Load a state dict of this rank's rows into a module, or a whole one into a module that is not divided."""
    if not any(hasattr(value, "to_local") for value in module.state_dict().values()):
        module.load_state_dict(rows)
        return
    for name, value in own_state(module).items():
        value.copy_(rows[name])


def _own(value: Any) -> Tensor:
    own: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return own


@dataclass(frozen=True)
class RowShards:
    """This rank's rows of a network: `parameters` by name, and `rows` by each name that tensors have in files.

    A parameter shares the memory of the network's own, `sharded`, and has its gradient after `take_gradients`.
    `trained` are the rows of the optimizer's parameters, in order.
    """

    ranks: Ranks
    sharded: Mapping[str, nn.Parameter]
    parameters: Mapping[str, nn.Parameter]
    rows: Mapping[str, Rows]
    trained: tuple[Rows, ...]

    @classmethod
    def of(
        cls,
        ranks: Ranks,
        network: nn.Module,
        model: DiffusionTransformer,
        heads: Mapping[str, nn.Parameter],
        gradient_dtype: Literal["fp32", "bf16"] = "fp32",
    ) -> RowShards:
        """Divide a network, the model alone or with heads, whose parameters are named as in `TrainState`. Collective.

        With `gradient_dtype` bf16 gradients are rounded to bfloat16 for their sum, as by `Ranks.wrap`.
        """
        whole = {**dict(model.named_parameters()), **heads}
        rows = {name: Rows.of(tuple(value.shape), ranks.rank, ranks.world_size) for name, value in whole.items()}
        places = {id(value): name for name, value in whole.items()}
        names = [places[id(value)] for value in network.parameters()]
        divide(ranks, network, model, gradient_dtype)
        sharded = dict(zip(names, network.parameters(), strict=True))
        with torch.no_grad():
            own = {name: nn.Parameter(_own(value), value.requires_grad) for name, value in sharded.items()}
        assert all(own[name].shape[0] == rows[name].count for name in own), "fully_shard divides as torch.chunk"
        trained = tuple(rows[name] for name, value in own.items() if value.requires_grad)
        in_files = {name.removeprefix("head.") if name in heads else name: part for name, part in rows.items()}
        return cls(ranks, sharded, own, in_files, trained)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Give the own parameters the gradients of the last backward pass, summed over all ranks."""
        for name, value in self.sharded.items():
            self.parameters[name].grad = None if value.grad is None else _own(value.grad)

    def zero_grad(self) -> None:
        """Let go of the gradients that were taken."""
        for value in self.parameters.values():
            value.grad = None

    def total_norm(self, norm: Tensor) -> Tensor:
        """The norm of the whole gradient, of the norm of this rank's rows, []. Collective."""
        squares = norm.double().square()
        dist.all_reduce(squares)
        return squares.sqrt().to(norm.dtype)

    def exchange(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: each part of the model gathers its weights when it is called."""

    @torch.no_grad()
    def whole(self, average: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An average with all rows of its tensors. `like` is not used. Collective."""
        return {name: self._gathered(value, self.rows.get(name)) for name, value in average.items()}

    def _gathered(self, value: Tensor, rows: Rows | None) -> Tensor:
        if rows is None:
            return value
        most = -(-rows.shape[0] // self.ranks.world_size)
        padded = value.new_zeros(most, *rows.shape[1:])
        padded[: rows.count] = value
        parts = [torch.empty_like(padded) for _ in range(self.ranks.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)[: rows.shape[0]]

    def rows_of(self, name: str, value: Tensor) -> Rows | None:
        """Which rows of a checkpoint's tensor this rank has; None if it is not divided.

        The tensor is whole, or has these rows. Tensors of the optimizer are named by the index of their parameter.
        """
        rows, index = self.rows.get(name), name.partition(".")[0]
        if rows is None and index.isdecimal() and int(index) < len(self.trained):
            rows = self.trained[int(index)]
        if rows is None or tuple(value.shape) not in (rows.shape, (rows.count, *rows.shape[1:])):
            return None
        return rows

    def written(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a file's tensors that this rank writes: its rows, and as rank 0 all that is not divided."""
        return {name: value for name, value in tensors.items() if self.ranks.rank == 0 or self.rows_of(name, value)}

    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of a file's whole tensors."""
        rows = {name: self.rows_of(name, value) for name, value in tensors.items()}
        return {name: value if (own := rows[name]) is None else own.cut(value) for name, value in tensors.items()}


def divide(
    ranks: Ranks, network: nn.Module, model: DiffusionTransformer, gradient_dtype: Literal["fp32", "bf16"]
) -> None:
    """Apply `fully_shard` to the parts of a model, and to the rest of the network. Collective.

    Gradients are summed, not averaged: losses are already divided by the global batch size. The parameters stay
    float32, and autocast rounds them as it would without.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # No model changes an output of its parts in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if gradient_dtype == "bf16" else None)
    for part in (*model_parts(model), network):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


@lru_cache(maxsize=64)
def row_share(model_config: ModelConfig, workers: int) -> float:
    """The part of the state that rank 0 has, which has most."""
    shapes = [tuple(value.shape) for value in shadow(model_config).parameters()]
    own = sum(Rows.of(shape, 0, workers).count * prod(shape[1:]) for shape in shapes)
    return own / sum(map(prod, shapes))


@lru_cache(maxsize=64)
def gathered_bytes(model_config: ModelConfig) -> int:
    """Bytes of whole weights and gradients that a worker has at once in a backward pass, at most, in float32.

    What belongs to no part of the model stays whole from its forward to its backward pass, and then has a gradient.
    Of the largest part there are the weights, and those of the next part with the buffer that they arrive in; its
    gradient, and the buffers of two sums of gradients.
    """
    model = shadow(model_config)
    parts = [sum(value.numel() for value in part.parameters()) for part in model_parts(model)]
    rest = sum(value.numel() for value in model.parameters()) - sum(parts)
    return 4 * (2 * rest + 6 * max(parts))
