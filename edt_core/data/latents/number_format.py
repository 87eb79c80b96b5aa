"""The numbers that latents are stored in: float32, float16, or bfloat16 (the upper half of a float32).

Widening is exact, so every reader has the same float32 numbers. Narrowing rounds to the nearest, ties to even.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.errors import UserError


@dataclass(frozen=True)
class NumberFormat:
    """A format of numbers, named as in `encode.store`.

    tensor: its dtype in torch. array: that of NumPy arrays, which have no bfloat16 and hold its bits. column: its type
    in Arrow. bits: those of its infinity, as an unsigned integer.
    """

    name: str
    tensor: torch.dtype
    array: np.dtype[Any]
    column: pa.DataType
    bits: int

    @property
    def is_half(self) -> bool:
        return self.array.itemsize == 2

    @property
    def spacing(self) -> float:
        """The largest distance between neighbouring numbers, relative to them."""
        return torch.finfo(self.tensor).eps

    def narrowed(self, values: NDArray[np.float32], what: str) -> NDArray[Any]:
        """Finite float32 values as stored. Raises UserError, which names them by `what`, if one is out of range."""
        if not self.is_half:
            return values
        rounded = torch.from_numpy(values).to(self.tensor)
        if not all_finite(rounded):
            raise UserError(
                f"{what} reach {np.abs(values).max():.6g}, and {self.name} ends at {torch.finfo(self.tensor).max:g}; "
                f"set encode.store={'bf16 or ' if self.name == 'fp16' else ''}fp32"
            )
        return self.array_of(rounded)

    def widened(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Stored values as float32, exactly."""
        if self.array == np.uint16:
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32, copy=False)

    def array_of(self, tensor: Tensor) -> NDArray[Any]:
        """A tensor of this dtype as an array of the same memory."""
        return tensor.view(torch.int16).numpy().view(self.array) if self.is_half else tensor.numpy()

    def tensor_of(self, stored: NDArray[Any]) -> Tensor:
        """An array of stored values as a tensor of the same memory."""
        return torch.from_numpy(stored.view(np.int16)).view(self.tensor) if self.is_half else torch.from_numpy(stored)


NUMBER_FORMATS = {
    numbers.name: numbers
    for numbers in (
        NumberFormat("fp32", torch.float32, np.dtype(np.float32), pa.float32(), 0x7F80_0000),
        NumberFormat("fp16", torch.float16, np.dtype(np.float16), pa.float16(), 0x7C00),
        NumberFormat("bf16", torch.bfloat16, np.dtype(np.uint16), pa.uint16(), 0x7F80),
    )
}


def all_finite(values: Tensor) -> bool:
    """Whether a tensor of one of these formats, on the CPU, has no infinity and no NaN. May be False for huge float32.

    One cheap pass, with numpy, because torch would wake threads. A finite sum means finite float32. The sum of half
    precision could overflow, so there the bits are compared, shifted to drop the sign.
    """
    numbers = next(numbers for numbers in NUMBER_FORMATS.values() if numbers.tensor == values.dtype)
    array = numbers.array_of(values)
    if not numbers.is_half:
        return bool(np.isfinite(array.sum()))
    return array.size == 0 or int(np.left_shift(array.view(np.uint16), 1).max()) < numbers.bits << 1
