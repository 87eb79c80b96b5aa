"""Latent shards: the same bytes however they were written, the same rows in both formats, no short or foreign reads."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from edt_core.data.latents import (
    LatentDataset,
    LatentInfo,
    LatentShard,
    LatentShardWriter,
    latent_schema,
    write_latent_tar,
)
from edt_core.data.scale import LatentScale
from edt_core.data.shards import read_tar
from edt_core.errors import UserError
from edt_core.store.layout import LATENT_ROWS_PER_BATCH, LATENT_TAR_MEMBER

SHAPE = (4, 2, 2)
INFO = LatentInfo("vae@0", LatentScale(0.7), 16, SHAPE, "images-00000.tar")
ROWS = 2 * LATENT_ROWS_PER_BATCH + 44  # the last record batch is not full


def made_up(number: int, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    posterior = rng.normal(size=(number, 2, 2, *SHAPE)).astype(np.float32)
    return [f"{i:08d}" for i in range(number)], rng.integers(0, 10, number), posterior


def write_shard(path: Path, number: int, seed: int = 0, info: LatentInfo = INFO, at_once: int = 1 << 30) -> np.ndarray:
    """Write a made-up shard in calls of `at_once` rows; returns its posterior."""
    keys, labels, posterior = made_up(number, seed)
    with LatentShardWriter(path, info) as writer:
        for start in range(0, number, at_once):
            rows = slice(start, start + at_once)
            writer.write(keys[rows], labels[rows], posterior[rows])
    assert writer.rows == number
    return posterior


def write_batches(path: Path, schema: pa.Schema, *batches: pa.RecordBatch) -> None:
    """An Arrow file of another's making."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def batch_of(rows: int, schema: pa.Schema) -> pa.RecordBatch:
    keys, labels, posterior = made_up(rows)
    columns = {
        "key": pa.array(keys),
        "label": pa.array(labels),
        **{
            name: pa.FixedSizeListArray.from_arrays(pa.array(posterior[:, side].ravel()), 2 * int(np.prod(SHAPE)))
            for side, name in enumerate(("posterior", "mirror_posterior"))
        },
    }
    return pa.record_batch([columns[field.name] for field in schema], schema=schema)


@pytest.mark.parametrize("at_once", [1, 7, LATENT_ROWS_PER_BATCH, LATENT_ROWS_PER_BATCH + 1])
def test_the_bytes_do_not_depend_on_how_the_rows_came(tmp_path: Path, at_once: int) -> None:
    write_shard(tmp_path / "whole", ROWS)
    write_shard(tmp_path / "parts", ROWS, at_once=at_once)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


@pytest.mark.parametrize("number", [0, 1, LATENT_ROWS_PER_BATCH, ROWS])
def test_a_shard_reads_back(tmp_path: Path, number: int) -> None:
    write_shard(tmp_path / "l.arrow", number, at_once=100)
    keys, labels, posterior = made_up(number)
    shard = LatentShard(tmp_path / "l.arrow")
    assert shard.info == INFO
    assert len(shard) == number
    assert shard.keys.to_pylist() == keys
    assert np.array_equal(shard.labels, labels)
    assert np.array_equal(shard.posterior(), posterior)


def test_record_batches_are_all_full_but_the_last(tmp_path: Path) -> None:
    write_shard(tmp_path / "l.arrow", ROWS, at_once=100)
    sizes = [len(image) for image, _ in LatentShard(tmp_path / "l.arrow").chunks]
    assert sizes == [LATENT_ROWS_PER_BATCH, LATENT_ROWS_PER_BATCH, 44]


def test_a_shard_that_was_not_finished_is_gone(tmp_path: Path) -> None:
    def encode() -> None:
        with LatentShardWriter(tmp_path / "l.arrow", INFO) as writer:
            writer.write(*made_up(ROWS))
            raise RuntimeError("the encoder died")

    with pytest.raises(RuntimeError, match="the encoder died"):
        encode()
    assert list(tmp_path.iterdir()) == []


def test_latents_are_views_of_the_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "l.arrow", ROWS)
    before = pa.total_allocated_bytes()
    shard = LatentShard(tmp_path / "l.arrow")
    assert pa.total_allocated_bytes() - before < 4096  # the posteriors alone are 142 kB
    assert not any(side.flags.owndata or side.flags.writeable for chunk in shard.chunks for side in chunk)


def test_the_tar_twin_holds_the_same_rows_and_nothing_else(tmp_path: Path) -> None:
    posterior = write_shard(tmp_path / "l.arrow", ROWS)
    shard = LatentShard(tmp_path / "l.arrow")
    assert write_latent_tar(tmp_path / "l.tar", shard) == ROWS
    write_latent_tar(tmp_path / "again.tar", zip(*made_up(ROWS), strict=True))
    assert (tmp_path / "l.tar").read_bytes() == (tmp_path / "again.tar").read_bytes()
    for place, (key, members) in enumerate(read_tar(tmp_path / "l.tar")):
        assert members.keys() == {LATENT_TAR_MEMBER, "json"}
        assert json.loads(members["json"]) == {"key": key, "label": int(shard.labels[place])}
        array = np.load(io.BytesIO(members[LATENT_TAR_MEMBER]), allow_pickle=False)
        assert array.shape == (2, 2, *SHAPE)
        assert np.array_equal(array, posterior[place])
    assert place == ROWS - 1


def test_a_cut_arrow_file_is_refused(tmp_path: Path) -> None:
    """Wherever it was cut: within a message, between two (which the stream format reads in silence), in the footer."""
    write_shard(tmp_path / "l.arrow", ROWS)
    data = (tmp_path / "l.arrow").read_bytes()
    messages = [match.start() for match in re.finditer(b"\xff{4}", data) if match.start() % 8 == 0]
    assert len(messages) >= 5  # schema, three record batches, end of stream
    cuts = {0, 1, *range(0, len(data), len(data) // 50), *range(len(data) - 1500, len(data), 31), len(data) - 1}
    for cut in sorted(cuts | {place + offset for place in messages for offset in (0, 8)}):
        (tmp_path / "cut.arrow").write_bytes(data[:cut])
        with pytest.raises(UserError, match="not a complete Arrow file"):
            LatentShard(tmp_path / "cut.arrow")


def test_the_stream_format_is_refused(tmp_path: Path) -> None:
    schema = latent_schema(INFO)
    with pa.OSFile(str(tmp_path / "l.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch_of(3, schema))
    with pytest.raises(UserError, match="not a complete Arrow file"):
        LatentShard(tmp_path / "l.arrow")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    schema = latent_schema(INFO)
    schema = schema.with_metadata({**schema.metadata, b"schema_version": b'"1"'})
    write_batches(tmp_path / "l.arrow", schema, batch_of(3, schema))
    with pytest.raises(
        UserError,
        match=r"has latent schema 1, and expected is 2 \(2; 3 for centred latents; 4 in half precision\); encode",
    ):
        LatentShard(tmp_path / "l.arrow")


def test_an_arrow_file_of_something_else_is_refused(tmp_path: Path) -> None:
    schema = latent_schema(INFO)
    write_batches(tmp_path / "bare.arrow", schema.remove_metadata(), batch_of(3, schema.remove_metadata()))
    with pytest.raises(UserError, match="is not a latent shard"):
        LatentShard(tmp_path / "bare.arrow")
    swapped = pa.schema([schema.field(i) for i in (1, 0, 2, 3)], metadata=schema.metadata)
    write_batches(tmp_path / "swapped.arrow", swapped, batch_of(3, swapped))
    with pytest.raises(UserError, match=r"has the columns label int64, key string"):
        LatentShard(tmp_path / "swapped.arrow")
    wider = schema.with_metadata(LatentInfo("vae", LatentScale(0.7), 16, (8, 2, 2)).to_metadata())
    write_batches(tmp_path / "wider.arrow", wider, batch_of(3, wider))
    with pytest.raises(UserError, match=r"\[32\].*a latent shard has.*\[64\]"):
        LatentShard(tmp_path / "wider.arrow")


@pytest.mark.parametrize("sizes", [(3, 3), (LATENT_ROWS_PER_BATCH, 3, 3), (LATENT_ROWS_PER_BATCH + 1,), (0,)])
def test_record_batches_of_other_sizes_are_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    schema = latent_schema(INFO)
    write_batches(tmp_path / "l.arrow", schema, *(batch_of(size, schema) for size in sizes))
    with pytest.raises(UserError, match=f"a latent shard has {LATENT_ROWS_PER_BATCH} in each"):
        LatentShard(tmp_path / "l.arrow")


def test_empty_cells_are_refused(tmp_path: Path) -> None:
    schema = latent_schema(INFO)
    columns = [*batch_of(3, schema).columns[:3], pa.nulls(3, schema.types[3])]
    write_batches(tmp_path / "l.arrow", schema, pa.record_batch(columns, schema=schema))
    with pytest.raises(UserError, match="empty cells"):
        LatentShard(tmp_path / "l.arrow")


def shards(tmp_path: Path, *sizes: int) -> tuple[list[Path], np.ndarray]:
    """Shards of these sizes, and the posterior of all their rows."""
    paths = [tmp_path / f"{k}.arrow" for k in range(len(sizes))]
    infos = [LatentInfo("vae@0", LatentScale(0.7), 16, SHAPE, f"images-{k:05d}.tar") for k in range(len(sizes))]
    made = [write_shard(path, size, k, infos[k]) for k, (path, size) in enumerate(zip(paths, sizes, strict=True))]
    return paths, np.concatenate(made)


def test_gather_takes_rows_and_mirrors_from_anywhere(tmp_path: Path) -> None:
    paths, everything = shards(tmp_path, ROWS, 5, 0, LATENT_ROWS_PER_BATCH)
    dataset = LatentDataset(paths)
    labels = np.concatenate([made_up(size, k)[1] for k, size in enumerate((ROWS, 5, 0, LATENT_ROWS_PER_BATCH))])
    total = len(everything)
    assert len(dataset) == total
    edges = [0, LATENT_ROWS_PER_BATCH - 1, LATENT_ROWS_PER_BATCH, ROWS - 1, ROWS, ROWS + 4, ROWS + 5, total - 1, 0]
    rng = np.random.default_rng(1)
    for indices in (np.array(edges), np.arange(total), rng.integers(0, total, 300), np.empty(0, np.int64)):
        mirror = rng.random(len(indices)) < 0.5
        out = np.full((len(indices), 2, *SHAPE), np.nan, np.float32)
        posterior, found = dataset.gather(indices, mirror, out)
        assert posterior is out
        assert np.array_equal(posterior, everything[indices, mirror.astype(int)])
        assert np.array_equal(found, labels[indices])
        assert np.array_equal(dataset.gather(indices, mirror)[0], posterior)


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_that_is_not_there_is_refused(tmp_path: Path, row: int) -> None:
    dataset = LatentDataset(shards(tmp_path, 5)[0])
    with pytest.raises(IndexError, match="of 5"):
        dataset.gather(np.array([0, row]), np.array([False, False]))


def test_shards_of_two_autoencoders_do_not_mix(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.arrow", 3)
    write_shard(tmp_path / "1.arrow", 3, info=LatentInfo("other", LatentScale(0.7), 16, SHAPE, "images-00001.tar"))
    with pytest.raises(UserError, match="was encoded as"):
        LatentDataset([tmp_path / "0.arrow", tmp_path / "1.arrow"])


def test_a_shard_given_twice_or_out_of_order_is_refused(tmp_path: Path) -> None:
    paths, _ = shards(tmp_path, 3, 4, 5)
    with pytest.raises(UserError, match=r"0\.arrow and .*2\.arrow both come from 'images-00000\.tar'"):
        LatentDataset([paths[0], paths[1], write_copy(paths[0], paths[2])])
    with pytest.raises(UserError, match="out of order"):
        LatentDataset([paths[1], paths[0]])


def write_copy(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


def test_a_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no latent shards"):
        LatentDataset([])
    with pytest.raises(UserError, match="contain no rows"):
        LatentDataset(shards(tmp_path, 0)[0])
