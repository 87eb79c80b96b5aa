"""Digests of very many images, by position, in a file without a name."""

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edt_core.data.tables.arrow_file import ROWS, scratch_file
from edt_core.store.errors import clear_space_errors

WIDTH = 32  # bytes of a sha256


class DigestRows:
    """N digests of 32 bytes, zeros where none was written. What is read is a copy: none stays in memory."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._file = scratch_file()
        self._file.truncate(number * WIDTH)

    def __len__(self) -> int:
        return self.number

    def write(self, first: int, digests: bytes) -> None:
        """Write digests from a position on. Raises UserError if the disk is full."""
        with clear_space_errors("the cache (set EDT_CACHE_DIR)"):
            os.pwrite(self._file.fileno(), digests, first * WIDTH)

    def read(self, first: int, stop: int) -> NDArray[np.uint8]:
        """Digests [first, stop), uint8 [n, 32]."""
        stop = min(stop, self.number)
        data = os.pread(self._file.fileno(), (stop - first) * WIDTH, first * WIDTH)
        return np.frombuffer(data, np.uint8).reshape(-1, WIDTH)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(position of the first, digests uint8 [n, 32]) of all, block by block."""
        for first in range(0, self.number, ROWS):
            yield first, self.read(first, first + ROWS)

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The digests at ascending positions, uint8 [n, 32]."""
        taken = np.empty((len(positions), WIDTH), np.uint8)
        bounds = np.searchsorted(positions, np.arange(0, self.number + ROWS, ROWS))
        for (first, block), low, high in zip(self.blocks(), bounds[:-1], bounds[1:], strict=True):
            taken[low:high] = block[positions[low:high] - first]
        return taken
