"""The streaming reader: latents from Arrow shards, a few blocks of which are on the node at a time.

- The order is that of `StreamOrder`: the same global batches for any number of workers, from any step on. Each epoch
  has each row once.
- A rank fetches the shards of the canonical nodes whose rows are in its share of the batch, and the next block while it
  reads one. Ranks of a machine share their shards by its cache, so a machine downloads a shard once an epoch, if its
  cache holds `disk_bytes`.
- A shard's sha256 is compared before any of its rows is used, and that of its file of tokens, which comes with it.
- Held-out rows are not in the stream. Those that are measured are read at the start, shard by shard.
- A store that does not answer is asked again for a quarter of an hour.

Legend: B global batch, b = B / canonical nodes, n a rank's share of the batch.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edt_core.data.latents import NUMBER_FORMATS, LatentDataset, LatentShard, NumberFormat
from edt_core.data.latents.tokens import Tokens, TokenTable
from edt_core.data.loader import BatchPlan, Buffers, LatentBatch
from edt_core.data.prefetch import is_abandoned
from edt_core.data.scale import LatentScale
from edt_core.data.streaming.order import Block, StreamOrder
from edt_core.errors import StoreUnavailableError, UserError
from edt_core.store.artifact import Artifact, FileEntry

BLOCKS_ON_DISK = 2  # of each canonical node: the one that is read, and the next one
_BLOCKS_AT_A_TIME = 2  # of a rank; the files of each are fetched in parallel
_ATTEMPTS = 3  # to map shards that another training's shards may drive out of the cache
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, *[60.0] * 14)  # between attempts to reach the store
_LOOK_EVERY_S = 0.2


Columns = tuple[NDArray[np.int64], NDArray[np.int64], Tokens | None]  # rows of all shards, labels, tokens


@dataclass(frozen=True)
class OpenShards:
    """Shards on this machine, mapped into memory, and their tokens."""

    shards: Sequence[LatentShard]
    tokens: TokenTable | None


@dataclass(frozen=True)
class ShardStream:
    """Arrow shards of a latents artifact to stream: each entry has its rows and sha256 according to the manifest.

    `tokens` are the files of tokens beside them, in the same order, if they are read. Of all rows, numbered in order of
    shard and row, those in `held`, int64 in order, are not in the stream.
    """

    artifact: Artifact
    entries: tuple[FileEntry, ...]
    latent_shape: tuple[int, int, int]  # C, h, h
    scale: LatentScale
    canonical_nodes: int  # a divisor of the global batch
    block: int  # shards of a canonical node whose rows are mixed
    store: str = "fp32"  # the numbers of the posteriors: a name of NUMBER_FORMATS
    tokens: tuple[FileEntry, ...] = ()
    held: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64), compare=False)

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """The place of each shard's first row among all rows, and the number of rows at the end."""
        return np.cumsum([0, *(entry.rows or 0 for entry in self.entries)])

    def __len__(self) -> int:
        return int(self.first_rows[-1]) - len(self.held)

    def without(self, rows: NDArray[np.int64]) -> "ShardStream":
        """The stream without these of all rows, int64 in order."""
        return replace(self, held=rows)

    def streamed_rows(self, shard: int) -> NDArray[np.int64]:
        """The rows of a shard that are in the stream, int64 in order."""
        start, stop = self.first_rows[shard : shard + 2].tolist()
        first, last = np.searchsorted(self.held, (start, stop))
        return np.delete(np.arange(stop - start), self.held[first:last] - start)

    @property
    def numbers(self) -> NumberFormat:
        """The format of the posteriors' numbers."""
        return NUMBER_FORMATS[self.store]

    def order(self, seed: int) -> StreamOrder:
        """The order of the rows that are in the stream."""
        held = np.diff(np.searchsorted(self.held, self.first_rows))
        return StreamOrder((np.diff(self.first_rows) - held).tolist(), seed, self.canonical_nodes, self.block)

    def disk_bytes(self, share: slice, batch: int) -> int:
        """The most bytes of shards that a node needs at a time whose ranks have rows `share` of the global batch."""
        return self.bytes_of(len(canonical_shares(share, batch, self.canonical_nodes)))

    def bytes_of(self, nodes: int) -> int:
        """The most bytes of shards that a machine with so many canonical nodes needs at a time."""
        sizes = np.array([entry.bytes for entry in self.entries])
        if self.tokens:
            sizes += [entry.bytes for entry in self.tokens]
        return most_bytes(sizes.tolist(), nodes, self.block)

    def open(self, indices: Sequence[int]) -> OpenShards:
        """Shards on this machine, after their sha256 was compared. Raises ManifestError or UserError for a bad one."""
        entries = [self.entries[index] for index in indices]
        beside = [self.tokens[index] for index in indices] if self.tokens else []
        for attempt in count(1):
            paths = self.artifact.verified_paths([*entries, *beside])
            try:
                shards = [LatentShard(path) for path in paths[: len(entries)]]
                tokens = TokenTable(paths[len(entries) :]) if beside else None
                break
            except UserError:
                if attempt == _ATTEMPTS or all(path.exists() for path in paths):
                    raise  # else another training has taken their place in the cache before they were mapped
        for entry, shard in zip(entries, shards, strict=True):
            self._check(entry, shard)
        if tokens is not None and len(tokens) != sum(map(len, shards)):
            raise UserError(
                f"{self.artifact.folder.uri} has {len(tokens)} rows of tokens for {sum(map(len, shards))} of its "
                "latents; encode the images again"
            )
        return OpenShards(shards, tokens)

    def gather(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Posterior [n, 2, C, h, h] and labels int64 [n] of some of all rows, not mirrored, also of held-out ones."""
        posterior = np.empty((len(rows), 2, *self.latent_shape), self.numbers.array)
        labels = np.empty(len(rows), np.int64)
        for places, dataset, own in self._shards_of(rows):
            posterior[places], labels[places] = dataset.gather(own, np.zeros(len(own), np.bool_))
        return posterior, labels

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels int64 [n] of some of all rows."""
        labels = np.empty(len(rows), np.int64)
        for places, dataset, own in self._shards_of(rows):
            labels[places] = dataset.labels[own]
        return labels

    def _shards_of(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], LatentDataset, NDArray[np.int64]]]:
        """Each shard that some of all rows are in: the places of these, the shard, and their rows in it.

        The next shard is fetched while one is read. No tokens are fetched.
        """
        of_shard = np.searchsorted(self.first_rows, rows, side="right") - 1
        shards = np.unique(of_shard).tolist()
        downloads = _Downloads(replace(self, tokens=()))
        try:
            ahead = deque(downloads.fetch([shard]) for shard in shards[:1])
            for shard, following in zip(shards, [*shards[1:], None], strict=True):
                opened = downloads.wait(ahead.popleft())
                if following is not None:
                    ahead.append(downloads.fetch([following]))
                places = np.flatnonzero(of_shard == shard)
                yield places, LatentDataset(opened.shards), rows[places] - self.first_rows[shard]
        finally:
            downloads.close()

    def _check(self, entry: FileEntry, shard: LatentShard) -> None:
        info = shard.info
        found = len(shard), info.latent_shape, info.scale, info.store
        if found != (entry.rows, self.latent_shape, self.scale, self.store):
            raise UserError(
                f"{self.artifact.folder.uri}/{entry.path} has {len(shard)} rows of {info.encoding}, but its artifact "
                f"says {entry.rows} rows of {self.latent_shape} in {self.store}; encode the images again"
            )


def canonical_shares(share: slice, batch: int, nodes: int) -> list[tuple[int, slice]]:
    """Of rows `share` of a global batch: each canonical node with such rows, and which of its b rows they are."""
    each = batch // nodes
    return [
        (node, slice(max(share.start - node * each, 0), min(share.stop - node * each, each)))
        for node in range(share.start // each, -(-share.stop // each))
    ]


def most_bytes(sizes: Sequence[int], nodes: int, block: int) -> int:
    """The most bytes of shards of these sizes that so many canonical nodes need on a disk at a time."""
    return sum(sorted(sizes, reverse=True)[: nodes * BLOCKS_ON_DISK * block])


def stream_shards(stream: ShardStream, plan: BatchPlan, start_step: int = 0) -> Generator[LatentBatch, None, None]:
    """Endless batches of steps start_step, start_step + 1, ...: a pure function of the stream, the plan and the step.

    Raises ManifestError or UserError during iteration for a shard that is missing or differs from the manifest.
    """
    assert plan.global_batch_size % stream.canonical_nodes == 0, (plan.global_batch_size, stream.canonical_nodes)
    each = plan.global_batch_size // stream.canonical_nodes
    buffers, order = Buffers(plan, stream.latent_shape, stream.numbers), stream.order(plan.seed)
    downloads = _Downloads(stream)
    try:
        nodes = [
            (_CanonicalNode(order, node, downloads, start_step * each + rows.start), rows)
            for node, rows in canonical_shares(plan.share, plan.global_batch_size, stream.canonical_nodes)
        ]
        for step in count(start_step):
            mirror = plan.mirror(step)
            posterior, array = buffers.empty()
            columns: list[Columns] = []
            row = 0
            for node, rows in nodes:
                part = slice(row, row + rows.stop - rows.start)
                columns += node.read(step * each + rows.start, mirror[part], array[part])
                row = part.stop
            del array  # only the batch may refer to a buffer in use
            indices, labels = (np.concatenate([column[k] for column in columns]) for k in range(2))
            tokens = torch.from_numpy(np.concatenate([column[2] for column in columns])) if stream.tokens else None
            yield LatentBatch(step, indices, mirror, posterior, torch.from_numpy(labels), tokens=tokens)
    finally:
        downloads.close()


class _Downloads:
    """Fetches blocks of shards in a few threads, each of which fetches several files at a time."""

    def __init__(self, stream: ShardStream) -> None:
        self.stream, self._closed = stream, threading.Event()
        self._threads = ThreadPoolExecutor(_BLOCKS_AT_A_TIME, thread_name_prefix="edt-shards")

    def fetch(self, shards: Sequence[int]) -> Future[OpenShards]:
        """Begin to fetch some shards."""
        return self._threads.submit(self._open, shards)

    def wait(self, shards: Future[OpenShards]) -> OpenShards:
        """The shards, when they are there; raises CancelledError when nobody reads the stream any more."""
        while not shards.done():
            wait([shards], timeout=_LOOK_EVERY_S)
            if is_abandoned():
                raise CancelledError
        return shards.result()

    def close(self) -> None:
        """Begin no more downloads. Those in progress end by themselves."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open(self, indices: Sequence[int]) -> OpenShards:
        for pause_s in _PAUSES_S:
            try:
                return self.stream.open(indices)
            except StoreUnavailableError:
                if self._closed.wait(pause_s):
                    raise
        return self.stream.open(indices)


class _CanonicalNode:
    """The stream of one canonical node, as far as this rank reads it: the block that is read, and the next one."""

    def __init__(self, order: StreamOrder, node: int, downloads: _Downloads, place: int) -> None:
        self._order, self._node, self._downloads = order, node, downloads
        self._next = self._fetch(order.block_at(node, place))
        self._open: _OpenBlock | None = None

    def read(self, first: int, mirror: NDArray[np.bool_], out: NDArray[Any]) -> Iterator[Columns]:
        """Gather the places of the stream from `first` on into all rows of `out`; yield the columns of some at a time.

        Places are read in increasing order.
        """
        row = 0
        while row < len(out):
            if self._open is None or first + row >= self._open.block.stop:
                self._advance()
                continue
            place, left = first + row - self._open.block.first, self._open.block.stop - first - row
            part = slice(row, row + min(len(out) - row, left))
            yield self._open.gather(slice(place, place + part.stop - row), mirror[part], out[part])
            row = part.stop

    def _advance(self) -> None:
        block, shards = self._next
        self._open = _OpenBlock(self._downloads.stream, block, self._downloads.wait(shards))
        self._next = self._fetch(self._order.block_at(self._node, block.stop))

    def _fetch(self, block: Block) -> tuple[Block, Future[OpenShards]]:
        return block, self._downloads.fetch(block.shards)


class _OpenBlock:
    """The rows of a block in the order of the stream, mapped into memory."""

    def __init__(self, stream: ShardStream, block: Block, opened: OpenShards) -> None:
        self.block, self._dataset, self._tokens = block, LatentDataset(opened.shards), opened.tokens
        of_shard, streamed = block.rows()
        numbers = np.array(block.shards)
        places = np.searchsorted(numbers, of_shard)
        kept = [stream.streamed_rows(number) for number in block.shards]
        rows = np.concatenate(kept)[np.cumsum([0, *map(len, kept)])[places] + streamed]
        self._rows = np.cumsum([0, *map(len, opened.shards)])[places] + rows  # in this block's shards
        self._indices = stream.first_rows[of_shard] + rows  # in all shards

    def gather(self, places: slice, mirror: NDArray[np.bool_], out: NDArray[Any]) -> Columns:
        """Gather rows of the block into `out`; their rows in all shards and labels, int64 [n] each, and tokens."""
        rows = self._rows[places]
        _, labels = self._dataset.gather(rows, mirror, out)
        return self._indices[places], labels, None if self._tokens is None else self._tokens.gather(rows, mirror)
