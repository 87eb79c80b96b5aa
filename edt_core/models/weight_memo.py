"""A memo of tensors that depend only on a model's weights, valid while the weights do not change.

A sampling chain calls a model hundreds of times with the same weights, and each call computes the same position biases
and, on a GPU, pads the same projections.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

_MOST_BYTES = 1 << 31  # of all in the memo: biases and padded projections of EDT-XL at 512 pixels in float32
Made = TypeVar("Made")  # a tensor, or a tuple of tensors and None

_memo: ContextVar[dict[Hashable, Any] | None] = ContextVar("_memo", default=None)


@contextmanager
def constant_weights() -> Iterator[None]:
    """Context in which models on this thread compute tensors of their weights once; they are discarded at the end.

    No weight may change within the context. Outside it nothing is stored, so nothing can be out of date.
    """
    token = _memo.set({})
    try:
        yield
    finally:
        _memo.reset(token)


def made_once(key: Hashable, make: Callable[[], Made]) -> Made:
    """The result of `make`, taken from the first call with this key within `constant_weights`.

    With gradients, and while compiling, it is always computed: gradients need it, and a compiler must trace it.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return make()
    memo = _memo.get()
    if memo is None:
        return make()
    if key not in memo:
        result = make()
        if _bytes(result) + sum(map(_bytes, memo.values())) > _MOST_BYTES:
            return result
        memo[key] = result
    made: Made = memo[key]
    return made


def _bytes(made: Any) -> int:
    tensors = made if isinstance(made, tuple) else (made,)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
