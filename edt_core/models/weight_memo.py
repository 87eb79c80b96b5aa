"""What a model makes of its weights alone, kept while the weights stand still.

A chain of samples calls a model hundreds of times with the same weights, and each call makes the same position biases.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_MOST_BYTES = 1 << 30  # of all that is kept: the biases of EDT-XL at 512 pixels in float32

_made: ContextVar[dict[Hashable, Tensor] | None] = ContextVar("_made", default=None)


@contextmanager
def constant_weights() -> Iterator[None]:
    """Within, on this thread, what models make of their weights alone is made once and thrown away at the end.

    No weight may change within. Outside nothing is kept, so nothing can be out of date.
    """
    token = _made.set({})
    try:
        yield
    finally:
        _made.reset(token)


def made_once(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """The result of `make`, from the first call with this key within `constant_weights`, else from this one.

    Gradients need a result of their own, and a compiler traces what is made.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return make()
    made = _made.get()
    if made is None:
        return make()
    if key not in made:
        result = make()
        if result.nbytes + sum(tensor.nbytes for tensor in made.values()) > _MOST_BYTES:
            return result
        made[key] = result
    return made[key]
