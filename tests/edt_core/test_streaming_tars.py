"""The streaming reader: every sample once an epoch over all ranks, no short reads, nothing unpickled."""

import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from edt_core.data.latents import LatentDataset, LatentInfo, LatentShard, LatentShardWriter, write_latent_tar
from edt_core.data.loader import BatchPlan, LatentBatch
from edt_core.data.scale import LatentScale
from edt_core.data.shards import npy_bytes, write_tar
from edt_core.data.streaming.tars import TarShard, TarStream, stream_tars
from edt_core.errors import UserError
from edt_core.store.folder import Folder, sha256_file

SHAPE = (4, 2, 2)


def shard_rows(start: int, rows: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    numbers = np.arange(start, start + rows)
    posterior = np.random.default_rng(start).normal(size=(rows, 2, 2, *SHAPE)).astype(np.float32)
    return [f"{number:08d}" for number in numbers], numbers, posterior


def tar_shard(folder: Folder, name: str, rows: int) -> TarShard:
    """What a manifest would say of a tar."""
    assert folder.local is not None
    return TarShard(folder, name, rows, sha256_file(folder.local / name))


def tars(folder: Path, *sizes: int, buffer: int = 16) -> TarStream:
    """Tar shards of these sizes; sample i has key and label i."""
    starts = np.cumsum([0, *sizes]).tolist()
    for k, size in enumerate(sizes):
        write_latent_tar(folder / f"latents-{k:05d}.tar", zip(*shard_rows(starts[k], size), strict=True))
    place = Folder.at(folder)
    shards = tuple(tar_shard(place, f"latents-{k:05d}.tar", size) for k, size in enumerate(sizes))
    return TarStream(shards, SHAPE, LatentScale(0.5), buffer)


def take(stream: TarStream, steps: int, start_step: int = 0, seed: int = 0, **options: int) -> list[LatentBatch]:
    plan = BatchPlan(seed, options.pop("global_batch_size", 10), 0.5, **options)
    batches = stream_tars(stream, plan, start_step)
    taken = list(islice(batches, steps))
    batches.close()
    return taken


def labels(batches: list[LatentBatch]) -> list[int]:
    return [label for batch in batches for label in batch.labels.tolist()]


def test_samples_are_those_of_the_arrow_shards(tmp_path: Path) -> None:
    paths = [tmp_path / f"{k}.arrow" for k in range(2)]
    for k, (path, rows) in enumerate(zip(paths, (13, 300), strict=True)):
        with LatentShardWriter(path, LatentInfo("vae", LatentScale(0.5), 16, SHAPE, f"images-{k}.tar")) as writer:
            writer.write(*shard_rows(13 * k, rows))
        write_latent_tar(path.with_suffix(".tar"), LatentShard(path))
    place = Folder.at(tmp_path)
    stream = TarStream((tar_shard(place, "0.tar", 13), tar_shard(place, "1.tar", 300)), SHAPE, LatentScale(0.5), 50)
    dataset = LatentDataset(paths)
    for batch in take(stream, 40):
        expected, _ = dataset.gather(batch.labels.numpy(), batch.mirror)  # row i has label i
        assert np.array_equal(batch.posterior.numpy(), expected)
        assert batch.keys == tuple(f"{label:08d}" for label in batch.labels.tolist())
        assert (batch.indices == -1).all()


def test_every_epoch_takes_every_sample_once(tmp_path: Path) -> None:
    stream = tars(tmp_path, 7, 30, 12, 1, 20)  # 70 samples: seven batches an epoch
    batches = take(stream, 21)
    assert [batch.step for batch in batches] == list(range(21))
    epochs = [labels(batches[start : start + 7]) for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(70)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_an_epoch_between_them(tmp_path: Path, world_size: int) -> None:
    stream = tars(tmp_path, *[10] * 6)
    steps = 60 // (5 * world_size)
    ranks = [
        take(stream, 2 * steps, global_batch_size=5 * world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in (slice(0, steps), slice(steps, 2 * steps)):
        assert sorted(label for batches in ranks for label in labels(batches[epoch])) == list(range(60))


def test_the_order_is_a_function_of_seed_step_and_world_size(tmp_path: Path) -> None:
    stream = tars(tmp_path, *[10] * 6)
    first = labels(take(stream, 12))
    assert labels(take(stream, 12)) == first
    assert labels(take(stream, 12, seed=1)) != first
    assert labels(take(stream, 3, world_size=2)) != first[:15]
    resumed = take(stream, 6, start_step=6)
    assert resumed[0].step == 6
    assert sorted(labels(resumed)) == list(range(60))  # step 6 begins epoch 1
    assert labels(resumed) != first[60:]  # which is drawn anew


def test_mirrors_are_those_of_the_step(tmp_path: Path) -> None:
    stream = tars(tmp_path, *[10] * 6)
    whole = np.concatenate([batch.mirror for batch in take(stream, 8)])
    ranks = [take(stream, 8, rank=rank, world_size=2) for rank in range(2)]
    assert np.array_equal(np.concatenate([b.mirror for pair in zip(*ranks, strict=True) for b in pair]), whole)


def test_shards_of_an_object_store_are_read_the_same_way(tmp_path: Path) -> None:
    import fsspec

    stream = tars(tmp_path, 20, 20)
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path), "/edt-streaming", recursive=True)
    place = Folder.at("memory://edt-streaming")
    other = TarStream(
        tuple(TarShard(place, s.name, s.rows, s.sha256) for s in stream.shards), SHAPE, LatentScale(0.5), 16
    )
    assert labels(take(other, 8)) == labels(take(stream, 8))
    remote.rm("/edt-streaming", recursive=True)


def test_fewer_shards_than_workers_are_refused(tmp_path: Path) -> None:
    stream = tars(tmp_path, 10, 0, 10)  # an empty shard gives nobody anything
    with pytest.raises(UserError, match=r"2 latent tar shards for 3 workers.*fewer workers.*images_per_shard"):
        stream_tars(stream, BatchPlan(0, 12, 0.5, 0, 3))


@pytest.mark.parametrize("stated", [9, 11])
def test_a_shard_of_another_number_of_rows_is_refused(tmp_path: Path, stated: int) -> None:
    stream = tars(tmp_path, 10)
    shards = (replace(stream.shards[0], rows=stated),)
    with pytest.raises(UserError, match=f"contains 10 samples, its manifest says {stated}"):
        take(TarStream(shards, SHAPE, LatentScale(0.5)), 5)


def test_a_cut_tar_is_never_read_short(tmp_path: Path) -> None:
    """Wherever it is cut. At the edge of a member webdataset itself sees a shorter tar and says nothing."""
    stream = tars(tmp_path, 12)
    path = tmp_path / stream.shards[0].name
    data = path.read_bytes()
    assert len(data) % 512 == 0
    cuts = {*range(0, len(data), 512), *range(0, len(data), 700)}
    refused = 0
    for cut in cuts:
        path.write_bytes(data[:cut])
        try:
            batches = take(stream, 2, global_batch_size=12)
        except UserError:
            refused += 1
        else:
            raise AssertionError(f"read {labels(batches)} from a tar cut at {cut}")
    assert refused == len(cuts)


def test_a_flipped_bit_is_found_at_the_end_of_its_shard(tmp_path: Path) -> None:
    stream = tars(tmp_path, 12)
    path = tmp_path / stream.shards[0].name
    data = bytearray(path.read_bytes())
    data[-2048] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="another sha256"):
        take(stream, 2, global_batch_size=12)


def one_tar(folder: Path, members: dict[str, bytes]) -> TarStream:
    write_tar(folder / "latents-00000.tar", [("00000000", members)])
    return TarStream((tar_shard(Folder.at(folder), "latents-00000.tar", 1),), SHAPE, LatentScale(0.5))


GOOD = {"posterior.npy": npy_bytes(shard_rows(0, 1)[2][0]), "json": b'{"key": "00000000", "label": 3}'}


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def _pickled_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_a_good_sample_is_taken(tmp_path: Path) -> None:
    assert labels(take(one_tar(tmp_path, GOOD), 2, global_batch_size=1)) == [3, 3]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**GOOD, "pyd": pickle.dumps(_Bomb())}, r"has a member '00000000\.pyd'"),
        ({**GOOD, "cls": b"3"}, r"has a member '00000000\.cls'"),
        ({**GOOD, "posterior.npy": _pickled_npy()}, "cannot be read"),
        ({**GOOD, "posterior.npy": pickle.dumps(_Bomb())}, "cannot be read"),
        ({**GOOD, "posterior.npy": npy_bytes(np.zeros((2, 2, 4, 2, 2)))}, "float64"),
        ({**GOOD, "posterior.npy": npy_bytes(np.zeros((4, 4, 2, 2), np.float32))}, r"\(4, 4, 2, 2\), not float32"),
        ({**GOOD, "json": b"{"}, "cannot be read"),
        ({**GOOD, "json": b'{"key": "1"}'}, "cannot be read"),
        ({"json": GOOD["json"]}, "cannot be read"),
    ],
)
def test_anything_but_our_members_is_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError, match=message):
        take(one_tar(tmp_path, members), 1, global_batch_size=1)


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    def twice() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield "00000000", GOOD
        yield "00000000", GOOD

    write_tar(tmp_path / "latents-00000.tar", twice())
    with pytest.raises(UserError, match="not a complete latent tar"):
        take(TarStream((tar_shard(Folder.at(tmp_path), "latents-00000.tar", 2),), SHAPE, LatentScale(0.5)), 1)


def test_leaving_a_stream_closes_its_files(tmp_path: Path) -> None:
    import os

    def open_tars() -> int:
        return sum(".tar" in os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")
    batches = stream_tars(tars(tmp_path, *[10] * 6), BatchPlan(0, 10, 0.5))
    next(batches)
    assert 0 < open_tars() <= 3  # the one that is read and those ahead, not all
    batches.close()
    assert open_tars() == 0
