"""Plan, order and cache at the sizes of large data sets and clusters: the code of a run, played by one process.

The listings are synthetic, and so are the shards: files of their size without content, each "fetched" in no time. What
a run does at that size is counted: fetches, bytes and the most on a disk, of every node of the cluster, one after the
other. The seconds are those of our code alone, of the processor.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edt_core.data.streaming.order import StreamOrder
from edt_core.data.streaming.shards import canonical_shares, most_bytes
from edt_core.data.subsets import joint_share
from edt_core.store.cache import Cache
from edt_core.store.folder import Folder
from edt_core.store.manifest import FileEntry
from jobs.benchmark.planning import CLASSES, plan_synthetic
from jobs.benchmark.table import Row, mib

IMAGES = (1_300_000, 14_000_000, 100_000_000)  # ImageNet, ImageNet-21k, and the size of LAION's subsets
WORKERS = (8, 64, 1024)
WORKERS_OF_NODE, ROWS, BLOCK = 8, 4096, 8  # a node's GPUs; the defaults of images_per_shard and shuffle_block
ROW_BYTES = 32 << 10  # of an image and its mirror image at 256 px, 2 x 2 x 4 x 32 x 32 numbers in half precision


@dataclass(frozen=True)
class Synthetic(Folder):
    """A store whose files have a size and no content. Counts what is fetched."""

    sizes: dict[str, int] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)

    def fetch(self, name: str, target: Path) -> str:
        self.fetched.append(name)
        target.touch()
        os.truncate(target, self.sizes[name])
        return digest_of(name)


def digest_of(name: str) -> str:
    """The sha256 in the manifest of a synthetic file."""
    return hashlib.sha256(name.encode()).hexdigest()


@dataclass(frozen=True)
class Played:
    """An epoch of a training. per_node: shards that one node fetched, at most; disk: bytes on its disk, at most."""

    shards: int
    nodes: int
    fetches: int
    twice: int  # fetches of a shard that the same node had fetched in this epoch
    per_node: int
    disk: int
    seconds: float  # of the processor


def play(work: Path, images: int, workers: int) -> Played:
    """What an epoch of streaming fetches, on all nodes of a cluster, each with a cache of the least size allowed."""
    rows = [ROWS] * (images // ROWS) + ([images % ROWS] if images % ROWS else [])
    nodes, batch = -(-workers // WORKERS_OF_NODE), max(256, workers)
    canonical = max(8, nodes)
    order = StreamOrder(rows, 0, canonical, BLOCK)
    sizes = {f"latents-{index:06d}.arrow": size * ROW_BYTES for index, size in enumerate(rows)}
    entries = [FileEntry(name, size, digest_of(name)) for name, size in sizes.items()]
    fetches = twice = per_node = disk = 0
    seconds = 0.0
    for node in range(nodes):
        ranks = range(node * WORKERS_OF_NODE, min((node + 1) * WORKERS_OF_NODE, workers))
        own = [number for number, _ in canonical_shares(joint_share(batch, ranks, workers), batch, canonical)]
        cache = Cache(work / f"cache-{node}", most_bytes(list(sizes.values()), len(own), BLOCK))
        store = Synthetic(f"synthetic://{node}", sizes)
        for wanted in blocks_in_time(order, own):
            started = time.process_time()
            cache.view(store, [entries[shard] for shard in wanted], "scale")
            seconds += time.process_time() - started
            disk = max(disk, bytes_below(cache.root / "objects"))
        fetches += len(store.fetched)
        twice += len(store.fetched) - len(set(store.fetched))
        per_node = max(per_node, len(store.fetched))
    return Played(len(rows), nodes, fetches, twice, per_node, disk, seconds)


def blocks_in_time(order: StreamOrder, nodes: Sequence[int]) -> Iterator[list[int]]:
    """The shards of each block of the first epoch, in the order in which a machine of these canonical nodes reads them.

    A block is fetched when its canonical node begins to read the one before it.
    """
    wanted: list[tuple[int, list[int]]] = []
    for node in nodes:
        place = before = 0
        while (block := order.block_at(node, place)).epoch == 0:
            wanted.append((before, block.shards))
            before, place = place, block.stop
    yield from (shards for _, shards in sorted(wanted, key=lambda pair: pair[0]))


def bytes_below(root: Path) -> int:
    """The sizes of all files."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def bench_scale(work: Path, scale: float) -> Iterator[list[Row]]:
    """Rows for plans, and for streams on clusters; `scale` times the images."""
    for images in (max(CLASSES, int(images * scale)) for images in IMAGES):
        planned = plan_synthetic(work, images)
        what = f"plan of {images:,} images, {planned.shards:,} shards"
        yield [
            Row(what, f"{planned.seconds:.1f} s"),
            Row(f"{what}, memory", mib(planned.peak), f"before it {mib(planned.before)}"),
        ]
        for workers in WORKERS:
            played = play(work / f"{images}-{workers}", images, workers)
            what = f"epoch of {images:,} images streamed to {workers:,} workers on {played.nodes} nodes"
            yield [
                Row(what, f"{played.fetches:,} fetches", f"{played.shards:,} shards", played.fetches / played.shards),
                Row(f"{what}: fetched twice by a node", f"{played.twice}", target="0"),
                Row(f"{what}: on a node's disk", f"{played.disk / 1e9:,.1f} GB", f"{played.per_node:,} fetches a node"),
                Row(f"{what}: our code", f"{1e3 * played.seconds / played.fetches:.1f} ms of a processor a fetch"),
            ]
