"""The memory of a model's forward pass, counted on tensors without values: "inference memory" in tables of papers.

Libraries, kernels' own work space and what an allocator keeps in reserve are not counted, so a GPU needs more.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edt_core.models import ModelConfig, shadow


@dataclass(frozen=True)
class ForwardMemory:
    """Bytes of a forward pass without gradient: the weights, and at the peak all other tensors at once."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


def forward_memory(config: ModelConfig, batch_size: int) -> ForwardMemory:
    """The memory of a forward pass of `batch_size` images in float32, inputs and output included.

    Attention is that of the fused kernel, which stores no scores, without modulation.
    """
    model, side = shadow(replace(config, amm_blocks=())).eval(), config.latent_size
    with FakeTensorMode(), torch.no_grad():
        weights: dict[str, Tensor] = {
            n: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for n, p in model.named_parameters()
        }
        weights |= {name: torch.empty(buffer.shape, dtype=buffer.dtype) for name, buffer in model.named_buffers()}
        with PeakMemory() as peak:
            x = torch.empty(batch_size, config.in_channels, side, side)
            t, y = (torch.zeros(batch_size, dtype=torch.int64) for _ in range(2))
            torch.func.functional_call(model, weights, (x, t, y))
    return ForwardMemory(sum(tensor.nbytes for tensor in weights.values()), peak.most)


class PeakMemory(TorchDispatchMode):
    """Within it, the bytes of the tensors that operations make, `now` and `most` at once. Views share their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it made."""
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and _key(leaf) not in given | self._known:
                self._add(leaf)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
