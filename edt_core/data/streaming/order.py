"""The order of streamed rows: a pure function of (seed, epoch), computed block by block.

An epoch permutes the shards, lays their rows end to end, and cuts them into one part for each canonical node: parts of
equal size, or with one row more. A canonical node reads its part in blocks of a few shards and permutes the rows of
each block. Global batch k has rows k*b to (k+1)*b - 1 of the stream of each canonical node, in the order of the nodes,
where b is the global batch size divided by their number: which machine reads them makes no difference.

Blocks of shards and canonical nodes are those of mosaicml/streaming (`py1br`, `num_canonical_nodes`). Each row occurs
once an epoch, and no row is repeated to make the parts equal: who has the additional rows changes from epoch to epoch,
so that no canonical node is ever more than one row ahead.

Memory: a few numbers for each shard, and one for each row of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.data.randomness import epoch_order

_ROWS = 1  # a last word other than 0: a generator of its own, not that of the shards' order, [seed, epoch]


class Part(NamedTuple):
    """Rows start to stop - 1 of a shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """Rows of a few shards that a canonical node reads together; `first` is the first one's place in its stream."""

    seed: int
    epoch: int
    node: int
    first: int
    parts: tuple[Part, ...]

    @property
    def stop(self) -> int:
        """The place behind the last row in the stream of the canonical node."""
        return self.first + sum(part.stop - part.start for part in self.parts)

    @property
    def shards(self) -> list[int]:
        """The shards, in order of their numbers."""
        return sorted(part.shard for part in self.parts)

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard and the row in it of each row of the block, int64 [n] each, in the order of the stream."""
        parts = sorted(self.parts)
        shards = np.concatenate([np.full(part.stop - part.start, part.shard) for part in parts])
        rows = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        seeds = np.random.SeedSequence([self.seed, self.epoch, self.node, self.first, _ROWS])
        order = np.random.Generator(np.random.Philox(seeds)).permutation(len(rows))
        return shards[order], rows[order]


@dataclass(frozen=True)
class _Epoch:
    shards: NDArray[np.int64]  # in the order of this epoch, without empty ones
    ends: NDArray[np.int64]  # of each of these shards, the place behind its last row
    bounds: NDArray[np.int64]  # [nodes + 1]: the part of canonical node i is bounds[i] to bounds[i + 1] - 1


class StreamOrder:
    """The order of shards with these numbers of rows, for `nodes` canonical nodes and blocks of `block` shards."""

    def __init__(self, rows: Sequence[int], seed: int, nodes: int, block: int) -> None:
        self.sizes, self.seed, self.nodes, self.block = np.array(rows, np.int64), seed, nodes, block
        self.total = int(self.sizes.sum())
        self._fewest, self._more = divmod(self.total, nodes)  # rows of a node in an epoch; nodes with a row more
        assert self.total, "a stream without rows"
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def block_at(self, node: int, place: int) -> Block:
        """The block that contains place `place` of a canonical node's stream."""
        number = self._epoch_of(node, place)
        epoch, start = self._epoch(number), self._start(number, node)
        first, stop = epoch.bounds[node : node + 2].tolist()  # this node's rows of the epoch
        # Every other node reads its rows from the end: two nodes that share a shard both read it in their first or last
        # block, so that a machine with both of them fetches it once.
        backwards = node % 2 == 0
        row = stop - 1 - (place - start) if backwards else first + place - start
        block = self._block_of(epoch, first, stop, row)
        parts = tuple(self._part(epoch, k, first, stop) for k in block)
        if backwards:
            before = stop - min(stop, int(epoch.ends[block[-1]]))
        else:
            before = max(first, int(epoch.ends[block[0] - 1]) if block[0] else 0) - first
        return Block(self.seed, number, node, start + before, parts)

    def _block_of(self, epoch: "_Epoch", first: int, stop: int, row: int) -> range:
        """The block that contains `row`, of the shards with rows first to stop - 1 in blocks of nearly equal size."""
        low, high, shard = np.searchsorted(epoch.ends, (first, stop - 1, row), side="right").tolist()
        shards = high - low + 1
        blocks = -(-shards // self.block)
        number = ((shard - low + 1) * blocks - 1) // shards  # the inverse of the two bounds below
        return range(low + number * shards // blocks, low + (number + 1) * shards // blocks)

    def _part(self, epoch: "_Epoch", k: int, first: int, stop: int) -> Part:
        """The rows of the epoch's k-th shard that are among rows first to stop - 1 of the epoch."""
        shard, end = int(epoch.shards[k]), int(epoch.ends[k])
        size = int(self.sizes[shard])
        return Part(shard, max(first - end + size, 0), min(stop - end + size, size))

    def _make_epoch(self, number: int) -> _Epoch:
        shards = epoch_order(self.seed, number, len(self.sizes))
        shards = shards[self.sizes[shards] > 0]
        has_more = (np.arange(self.nodes) - self._more * number) % self.nodes < self._more
        return _Epoch(shards, np.cumsum(self.sizes[shards]), np.cumsum([0, *(self._fewest + has_more)]))

    def _start(self, epoch: int, node: int) -> int:
        """The place of an epoch's first row in the stream of a canonical node.

        In epoch e the `_more` nodes from e * _more on, counted in a circle, have a row more.
        """
        return epoch * self._fewest + (epoch * self._more - node + self.nodes - 1) // self.nodes

    def _epoch_of(self, node: int, place: int) -> int:
        epoch = place * self.nodes // self.total
        while self._start(epoch, node) > place:
            epoch -= 1
        while self._start(epoch + 1, node) <= place:
            epoch += 1
        return epoch
