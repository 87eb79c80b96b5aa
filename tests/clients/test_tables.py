"""Latent shards as tables: pyarrow, Polars, DuckDB and the `datasets` of Hugging Face. None of them knows our code."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edt_core.data.latents import LatentShard, LatentShardWriter
from tests.clients.conftest import Images


def first_means(shards: list[Path]) -> list[float]:
    """The first number of the posterior's mean of each row, as our own reader has it."""
    return [float(row[0, 0, 0, 0, 0]) for path in shards for row in LatentShard(path).posterior()]


def test_pyarrow_reads_one_data_set_of_all_shards(images: Images, latent_shards: list[Path]) -> None:
    import pyarrow.dataset

    folder = str(latent_shards[0].parent)
    table = pyarrow.dataset.dataset([str(path) for path in latent_shards], format="ipc").to_table()
    assert table["key"].to_pylist() == images.keys
    assert table["label"].to_pylist() == images.labels.tolist()
    assert table["posterior"].combine_chunks().flatten().to_numpy().size == len(images.keys) * 2 * 4 * 8 * 8
    one = pyarrow.dataset.dataset(folder, format="ipc", exclude_invalid_files=True)
    assert one.count_rows() == len(images.keys)


@pytest.mark.extern
def test_polars_reads_and_scans_them(images: Images, latent_shards: list[Path]) -> None:
    polars = pytest.importorskip("polars")
    table = polars.read_ipc([str(path) for path in latent_shards])
    assert table["key"].to_list() == images.keys
    assert table["posterior"].arr.first().to_list() == first_means(latent_shards)
    counted = polars.scan_ipc(str(latent_shards[0].parent / "latents-*.arrow")).group_by("label").len().collect()
    assert dict(counted.iter_rows()) == dict(zip(*np.unique(images.labels, return_counts=True), strict=True))


@pytest.mark.extern
def test_duckdb_counts_them(images: Images, latent_shards: list[Path]) -> None:
    """Through Arrow's data sets: DuckDB itself has no reader of the format."""
    import pyarrow.dataset

    connection = pytest.importorskip("duckdb").connect()
    latents = pyarrow.dataset.dataset([str(path) for path in latent_shards], format="ipc")
    connection.register("latents", latents)
    rows = connection.sql("SELECT label, count(*) FROM latents GROUP BY label ORDER BY label").fetchall()
    assert rows == list(zip(*(part.tolist() for part in np.unique(images.labels, return_counts=True)), strict=True))
    means = connection.sql("SELECT posterior[1] FROM latents ORDER BY key").fetchall()
    assert [mean for (mean,) in means] == first_means(latent_shards)


@pytest.fixture
def half_shards(latent_shards: list[Path], tmp_path: Path) -> list[Path]:
    """The latents in float16."""
    paths = []
    for path in latent_shards:
        shard, paths = LatentShard(path), [*paths, tmp_path / path.name]
        with LatentShardWriter(paths[-1], replace(shard.info, store="fp16")) as writer:
            writer.write(shard.keys.to_pylist(), shard.labels, shard.posterior())
    return paths


@pytest.mark.extern
def test_polars_reads_float16(half_shards: list[Path]) -> None:
    polars = pytest.importorskip("polars")
    posterior = polars.read_ipc([str(path) for path in half_shards])["posterior"].to_numpy()
    assert posterior.dtype == np.float16
    assert posterior[:, 0].tolist() == first_means(half_shards)


@pytest.mark.extern
def test_duckdb_reads_float16_that_pyarrow_widened(half_shards: list[Path]) -> None:
    import pyarrow as pa
    import pyarrow.dataset

    duckdb = pytest.importorskip("duckdb")
    connection = duckdb.connect()
    latents = pyarrow.dataset.dataset([str(path) for path in half_shards], format="ipc")
    connection.register("latents", latents)
    with pytest.raises(duckdb.NotImplementedException, match="Arrow Type e"):
        connection.sql("SELECT posterior[1] FROM latents").fetchall()
    table = latents.to_table(columns=["key", "label", "posterior"])
    wide = pa.list_(pa.float32(), table["posterior"].type.list_size)
    connection.register("widened", table.set_column(2, "posterior", table["posterior"].cast(wide)))
    means = connection.sql("SELECT posterior[1] FROM widened ORDER BY key").fetchall()
    assert [mean for (mean,) in means] == first_means(half_shards)


@pytest.mark.extern
def test_hugging_face_datasets_reads_image_shards(images: Images, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    shards = str(images.shards[0].parent / "images-*.tar")
    read = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir=str(tmp_path))
    assert read["__key__"][:] == images.keys
    assert read["cls"][:] == images.labels.tolist()
    assert np.array_equal(np.stack([np.asarray(image) for image in read["webp"]]), images.pixels)
    streamed = datasets.load_dataset("webdataset", data_files=shards, split="train", streaming=True)
    assert [row["cls"] for row in streamed] == images.labels.tolist()


@pytest.mark.extern
def test_hugging_face_datasets_reads_latents(images: Images, latent_shards: list[Path], tmp_path: Path) -> None:
    """By `load_dataset`: `Dataset.from_file` takes Arrow's stream format alone, and these are files."""
    datasets = pytest.importorskip("datasets")
    paths = [str(path) for path in latent_shards]
    read = datasets.load_dataset("arrow", data_files=paths, split="train", cache_dir=str(tmp_path))
    assert read["key"][:] == images.keys
    assert read["label"][:] == images.labels.tolist()
    assert [row[0] for row in read["posterior"]] == first_means(latent_shards)
    with pytest.raises(Exception, match="metadata bytes"):
        datasets.Dataset.from_file(paths[0])
