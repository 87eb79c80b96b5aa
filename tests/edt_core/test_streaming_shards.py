"""The streaming reader of Arrow shards: each row once an epoch, the same batches on any number of ranks, from any step,
with a bounded number of shards on the disk, each of them fetched once."""

import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest

from edt_core.config import TrainConfig
from edt_core.data.batches import batches_of
from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.data.loader import BatchPlan, LatentBatch
from edt_core.data.prefetch import prefetched
from edt_core.data.scale import LatentScale
from edt_core.data.streaming import ShardStream, StreamOrder
from edt_core.data.streaming import shards as reader
from edt_core.data.streaming.order import Part
from edt_core.data.streaming.shards import OpenShards
from edt_core.errors import StoreUnavailableError, UserError
from edt_core.store.artifact import Artifact, ArtifactWriter, FileEntry
from edt_core.store.cache import Cache
from edt_core.store.folder import Folder
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from tests.support.batches import assert_held_batches_stay
from tests.support.trainings import contents, cut_back, narrow, place, same

SHAPE = (4, 2, 2)
BATCH = 12
names = count()


def latents(sizes: Sequence[int], location: str, store: str = "fp32") -> Artifact:
    """A latents artifact with shards of these sizes; the label of row i of all rows is i."""
    out = ArtifactWriter(Folder.at(location), "latents", "0" * 64)
    start = 0
    for k, size in enumerate(sizes):

        def write(path: Path, start: int = start, size: int = size, k: int = k) -> int:
            info = LatentInfo("vae", LatentScale(0.5), 16, SHAPE, f"images-{k:05d}.tar", store)
            with LatentShardWriter(path, info) as writer:
                values = np.random.default_rng(k).normal(size=(size, 2, 2, *SHAPE)).astype(np.float32)
                writer.write([f"{row}" for row in range(start, start + size)], range(start, start + size), values)
            return size

        out.write(f"latents-{k:05d}.arrow", write)
        start += size
    return out.commit({}, {}, {})


def stream_of(artifact: Artifact, nodes: int = 4, block: int = 2, store: str = "fp32") -> ShardStream:
    return ShardStream(artifact, tuple(artifact.entries()), SHAPE, LatentScale(0.5), nodes, block, store)


def stream(sizes: Sequence[int], location: str, nodes: int = 4, block: int = 2) -> ShardStream:
    return stream_of(latents(sizes, location), nodes, block)


def remote() -> str:
    return f"memory://edt-shards-{next(names)}"


def take(stream: ShardStream, steps: int, start: int = 0, rank: int = 0, world_size: int = 1) -> list[LatentBatch]:
    with closing(batches_of(stream, BatchPlan(3, BATCH, 0.5, rank, world_size), start)) as batches:
        return list(islice(batches, steps))


def rows(batches: Sequence[LatentBatch]) -> list[int]:
    return [row for batch in batches for row in batch.indices.tolist()]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Counter[str]]:
    """An empty cache, and the downloads of each file into it."""
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "cache"))
    counts: Counter[str] = Counter()
    fetch = Folder.fetch

    def counted(self: Folder, name: str, target: Path) -> str:
        counts[name] += 1
        return fetch(self, name, target)

    monkeypatch.setattr(Folder, "fetch", counted)
    yield counts
    for thread in threading.enumerate():  # downloads in progress when a stream was closed
        if thread.name.startswith("edt-shards"):
            thread.join()


# --- the order


def all_blocks(order: StreamOrder, node: int, epochs: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Each block of a canonical node's first epochs: its epoch, and its rows as (shard, row)."""
    place = 0
    while (block := order.block_at(node, place)).epoch < epochs:
        assert block.first == place
        assert len(block.parts) <= order.block
        assert all(order.block_at(node, inside) == block for inside in (place, block.stop - 1))
        yield block.epoch, list(zip(*(column.tolist() for column in block.rows()), strict=True))
        place = block.stop


def all_parts(order: StreamOrder, node: int) -> Iterator[tuple[int, Part]]:
    """The parts of shards that a canonical node reads in the first epoch, with the number of their block."""
    place = number = 0
    while (block := order.block_at(node, place)).epoch == 0:
        yield from ((number, part) for part in block.parts)
        place, number = block.stop, number + 1


def test_canonical_nodes_that_share_a_shard_read_it_at_the_same_time() -> None:
    for seed in range(40):
        draw = random.Random(seed)
        nodes = draw.randint(2, 9)
        order = StreamOrder([draw.randint(20, 90) for _ in range(nodes * draw.randint(5, 9))], seed, nodes, 3)
        found: dict[int, list[float]] = {}
        for node in range(nodes):
            parts = list(all_parts(order, node))
            last = parts[-1][0]
            for block, part in parts:
                found.setdefault(part.shard, []).append(0 if block == 0 else 1 if block == last else 0.5)
        shared = [places for places in found.values() if len(places) > 1]
        assert shared
        assert all(len(places) == 2 and places[0] == places[1] != 0.5 for places in shared), seed


def test_each_row_occurs_once_an_epoch_whatever_the_shards_nodes_and_blocks() -> None:
    for seed in range(120):
        draw = random.Random(seed)
        sizes = [draw.choice([0, 1, 3, 7, 20]) for _ in range(draw.randint(1, 12))] + [1]
        order = StreamOrder(sizes, seed, draw.randint(1, 9), draw.randint(1, 5))
        epochs: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
        starts = []
        for node in range(order.nodes):
            blocks = list(all_blocks(order, node, 3))
            for epoch, block in blocks:
                epochs[epoch] += block
            starts.append(sum(len(block) for epoch, block in blocks))
        whole = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
        assert all(sorted(epoch) == whole for epoch in epochs.values()), seed
        assert max(starts) - min(starts) <= 1, seed  # after three epochs, no node is more than a row ahead


def test_the_order_is_a_function_of_seed_and_epoch_and_mixes_the_rows_of_a_block() -> None:
    sizes = [50] * 40

    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        order = StreamOrder(sizes, seed, 2, 5)
        return [
            row
            for node in range(2)
            for at, block in all_blocks(order, node, number + 1)
            if at == number
            for row in block
        ]

    assert epoch(0, 1) == epoch(0, 1)
    assert len({tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4
    same_shard = np.mean([one[0] == two[0] for one, two in zip(epoch(0, 0), epoch(0, 0)[1:], strict=False)])
    assert abs(same_shard - 1 / 5) < 0.05  # of neighbours, as many as if the five shards of a block were one bag


def test_an_order_of_a_hundred_million_rows_needs_only_its_shards() -> None:
    order = StreamOrder([4096] * 25_000, 0, 128, 4)
    block = order.block_at(77, 10_000_000)
    assert block.epoch == 12
    assert len(block.rows()[0]) == block.stop - block.first <= 4 * 4096


# --- the reader


def test_rows_are_those_of_the_mapped_shards(tmp_path: Path) -> None:
    for store in ("fp32", "fp16", "bf16"):
        artifact = latents([13, 300, 1, 40], str(tmp_path / store), store)
        dataset = LatentDataset(artifact.paths())
        for batch in take(stream_of(artifact, store=store), 60):
            expected, labels = dataset.gather(batch.indices, batch.mirror)
            assert np.array_equal(dataset.info.numbers.array_of(batch.posterior), expected)
            assert np.array_equal(batch.labels.numpy(), labels)
            assert np.array_equal(batch.indices, labels)  # of these shards


def test_an_epoch_has_each_row_once_and_the_next_one_another_order(tmp_path: Path) -> None:
    batches = take(stream([7, 30, 12, 0, 1, 22], str(tmp_path)), 18)  # 72 rows: six batches an epoch
    epochs = [rows(batches[start : start + 6]) for start in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(72)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_are_the_same_on_any_number_of_ranks_and_from_any_step(tmp_path: Path) -> None:
    shards = stream([7, 30, 12, 0, 1, 20], str(tmp_path))
    whole = take(shards, 16)
    for world_size in (2, 3, 5, 12):
        ranks = [take(shards, 9, 7, rank, world_size) for rank in range(world_size)]
        for step, batch in enumerate(whole[7:]):
            shares = [rank[step] for rank in ranks]
            assert {share.step for share in shares} == {batch.step}
            assert rows(shares) == rows([batch])
            assert np.array_equal(
                np.concatenate([share.posterior.numpy() for share in shares]), batch.posterior.numpy()
            )
    for start in range(16):
        assert rows(take(shards, 16 - start, start)) == rows(whole[start:])


def test_a_batch_is_not_changed_while_something_refers_to_it(tmp_path: Path) -> None:
    with closing(batches_of(stream([30] * 4, str(tmp_path)), BatchPlan(0, BATCH, 0.5))) as batches:
        assert_held_batches_stay(batches)


# --- on a node


def test_a_node_fetches_each_of_its_shards_once_an_epoch(fetched: Counter[str]) -> None:
    shards = stream([BATCH * 2] * 8, remote())  # 16 steps an epoch, 4 canonical nodes with 2 shards each
    assert len(rows(take(shards, 15))) == 15 * BATCH
    assert set(fetched.values()) == {1}
    assert sum(fetched.values()) == 8
    fetched.clear()
    Cache.of_node().root.rename(Cache.of_node().root.with_name("full"))
    take(shards, 3, rank=0, world_size=2)  # of the half of the canonical nodes
    assert sum(fetched.values()) <= 4 + 4  # this epoch's, and the next block, which is the next epoch's


def test_the_cache_is_bounded_and_nothing_is_fetched_twice(
    fetched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = stream([BATCH * 2] * 24, remote(), nodes=2)
    bound = shards.disk_bytes(slice(0, BATCH), BATCH)
    largest = sorted(entry.bytes for entry in shards.entries)[-2 * 2 * 2 :]  # two blocks of two shards for both nodes
    assert bound == sum(largest)
    monkeypatch.setenv("EDT_CACHE_BYTES", str(bound))
    with closing(batches_of(shards, BatchPlan(3, BATCH, 0.5))) as batches:
        for _ in islice(batches, 40):  # of 48 steps of an epoch; then the next one's first blocks are fetched
            files = Cache.of_node().root.glob("objects/*/*")
            assert sum(1 for file in files if not file.name.startswith(".")) <= 8 + 4  # and what is arriving
    assert len(fetched) >= 20  # all but the blocks that were still to come
    assert set(fetched.values()) == {1}


def test_a_shard_that_two_canonical_nodes_share_is_fetched_once(
    fetched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = stream([BATCH * 2] * 27, remote())  # each node's part is 6.75 shards
    monkeypatch.setenv("EDT_CACHE_BYTES", str(shards.disk_bytes(slice(0, BATCH), BATCH)))
    take(shards, 36)  # of 54 steps: more than half of the blocks, but not the last ones
    assert set(fetched.values()) == {1}
    order = shards.order(3)
    parts = [part for node in range(4) for _, part in all_parts(order, node)]
    assert max(Counter(part.shard for part in parts).values()) == 2


def test_two_trainings_share_a_cache_that_is_too_small_for_both(
    fetched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are fetched again, but none is missed, and the limit holds."""
    sources = [stream([BATCH * 2] * 8, remote(), nodes=2, block=1) for _ in range(2)]
    bound = sources[0].disk_bytes(slice(0, BATCH), BATCH)
    monkeypatch.setenv("EDT_CACHE_BYTES", str(bound))
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda source: rows(take(source, 32)), sources)
    assert sorted(first) == sorted(second) == sorted([*range(8 * BATCH * 2)] * 2)
    held = [path for path in Cache.of_node().root.glob("objects/*/*") if not path.name.startswith(".")]
    assert sum(path.stat().st_size for path in held) <= bound


def test_the_next_block_arrives_while_one_is_read(fetched: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, blocks, opened = threading.Event(), [0], ShardStream.open

    def counted(self: ShardStream, indices: Sequence[int]) -> OpenShards:
        shards = opened(self, indices)
        blocks[0] += 1
        if blocks[0] == 2:
            arrived.set()
        return shards

    monkeypatch.setattr(ShardStream, "open", counted)
    shards = stream([BATCH * 4] * 8, remote(), nodes=1)
    with closing(batches_of(shards, BatchPlan(3, BATCH, 0.5))) as batches:
        next(batches)
        assert arrived.wait(60)  # the second block, without another batch
        assert len(fetched) == 4


# --- faults


def test_a_damaged_shard_is_found_before_a_row_of_it_is_used(tmp_path: Path) -> None:
    shards = stream([30] * 4, str(tmp_path))
    path = tmp_path / "latents-00002.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    used: list[int] = []

    def use_all() -> None:
        for batch in batches_of(shards, BatchPlan(0, BATCH, 0.5)):
            used.extend(rows([batch]))

    with pytest.raises(UserError, match=r"latents-00002\.arrow has .* another sha256"):
        use_all()
    assert not set(used) & set(range(60, 90))


def test_a_shard_that_is_replaced_or_removed_while_it_is_streamed_ends_the_training(fetched: Counter[str]) -> None:
    import fsspec

    for change in ("replaced", "removed"):
        shards = stream([BATCH * 2] * 8, remote(), nodes=1)
        place = shards.artifact.folder.uri.removeprefix("memory:/")
        with closing(batches_of(shards, BatchPlan(3, BATCH, 0.5))) as batches:
            next(batches)
            last = f"{place}/{shards.entries[shards.order(3).block_at(0, 8 * 2 * BATCH - 1).shards[-1]].path}"
            files = fsspec.filesystem("memory")
            if change == "replaced":
                files.pipe({last: files.cat(f"{place}/{shards.entries[0].path}")[:-1] + b"x"})
            else:
                files.rm(last)
            with pytest.raises(UserError, match=r"is damaged|is missing"):
                list(islice(batches, 40))


def test_a_shard_of_another_encoding_or_number_of_rows_is_refused(tmp_path: Path) -> None:
    artifact = latents([30, 30], str(tmp_path))
    other = ShardStream(artifact, tuple(artifact.entries()), SHAPE, LatentScale(0.7), 1, 1)
    with pytest.raises(UserError, match="encode the images again"):
        take(other, 1)


def test_a_store_that_does_not_answer_is_asked_again(fetched: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, fetch, left = stream([BATCH * 2] * 8, remote(), nodes=1), Folder.fetch, [3]
    assert 600 < sum(reader._PAUSES_S) < 1_200

    def fail(self: Folder, name: str, target: Path) -> str:
        if left[0]:
            left[0] -= 1
            raise StoreUnavailableError("the store cannot be reached")
        return fetch(self, name, target)

    monkeypatch.setattr(Folder, "fetch", fail)
    monkeypatch.setattr(reader, "_PAUSES_S", (0.0,) * 3)
    assert len(take(source, 1)) == 1
    left[0] = 1_000
    with pytest.raises(StoreUnavailableError):
        take(source, 16)


def test_a_stream_is_closed_while_its_store_hangs(fetched: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, go, opened = stream([BATCH] * 8, remote(), nodes=1, block=1), threading.Event(), ShardStream.open

    def hang(self: ShardStream, indices: Sequence[int]) -> OpenShards:
        if len(fetched) >= 1:  # all after the first block
            go.wait(60)
        return opened(self, indices)

    monkeypatch.setattr(ShardStream, "open", hang)
    batches = prefetched(batches_of(source, BatchPlan(3, BATCH, 0.5)), 2)
    next(batches)
    batches.close()
    assert "edt-prefetch" not in {thread.name for thread in threading.enumerate()}
    go.set()


def test_shards_that_another_training_drives_out_before_they_are_mapped_are_fetched_again(
    fetched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, left = stream([BATCH * 2] * 4, remote(), nodes=1), [2]
    paths_of = Artifact.verified_paths

    def driven_out(self: Artifact, entries: Sequence[FileEntry]) -> list[Path]:
        paths = paths_of(self, entries)
        if left[0]:
            left[0] -= 1
            paths[-1].resolve().unlink()
        return paths

    monkeypatch.setattr(Artifact, "verified_paths", driven_out)
    assert [len(shard) for shard in source.open([0, 1]).shards] == [BATCH * 2] * 2
    left[0] = 3
    with pytest.raises(UserError):
        source.open([2, 3])


# --- training


@pytest.mark.usefixtures("quickly", "one_thread", "no_thread_stays")
def test_a_training_resumes_exactly_within_an_epoch(latents_artifact: Artifact, tmp_path: Path) -> None:
    config = TrainConfig(
        model="EDT-Tiny/2", reader="stream", global_batch_size=8, max_steps=6, checkpoint_every=3, log_every=1
    )
    counts, entries = latents_artifact.counts, tuple(latents_artifact.entries("*.arrow"))
    shards = ShardStream(
        latents_artifact, entries, tuple(counts["latent_shape"]), LatentScale.of(counts), config.canonical_nodes, 1
    )
    whole = train(config, narrow(), shards, LocalContext(tmp_path / "a"))
    resumed = train(config, narrow(), shards, cut_back(tmp_path / "a", tmp_path / "b", 3))
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert contents(place(tmp_path / "a", 6)) == contents(place(tmp_path / "b", 6))


def test_canonical_nodes_divide_the_batch() -> None:
    found = [TrainConfig(global_batch_size=size).canonical_nodes for size in (256, 48, 100, 7, 11, 1)]
    assert found == [8, 8, 5, 7, 1, 1]
    assert TrainConfig(global_batch_size=48, num_canonical_nodes=16).canonical_nodes == 16
    with pytest.raises(ValueError, match="num_canonical_nodes is 9, which does not divide global_batch_size, 48"):
        TrainConfig(reader="stream", global_batch_size=48, num_canonical_nodes=9)
