"""Columns of values of a fixed number of bytes, such as digests, from arrays and back, without a copy."""

from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_DIGEST = 32  # bytes of a sha256


def bytes_column(values: NDArray[Any]) -> pa.FixedSizeBinaryArray:
    """A column with the bytes of each row of an array [N, ...]."""
    width = values.itemsize * prod(values.shape[1:])
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), [None, data])


def digests_in(column: pa.FixedSizeBinaryArray) -> NDArray[np.uint8]:
    """The digests of a column, uint8 [N, 32]."""
    data = np.frombuffer(column.buffers()[1], np.uint8) if len(column) else np.empty(0, np.uint8)
    return data[_DIGEST * column.offset : _DIGEST * (column.offset + len(column))].reshape(-1, _DIGEST)
