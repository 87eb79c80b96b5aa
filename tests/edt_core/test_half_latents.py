"""Latents in half precision: rounded once and widened exactly, with the largest error beside them, by both readers."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.data.latents import (
    NUMBER_FORMATS,
    LatentDataset,
    LatentInfo,
    LatentShard,
    LatentShardWriter,
    latent_schema,
    write_latent_tar,
)
from edt_core.data.latents.number_format import all_finite
from edt_core.data.latents.statistics import channel_sums, deviation, store_error
from edt_core.data.loader import BatchPlan, LatentBatch, latent_batches, require_finite
from edt_core.data.scale import LatentScale
from edt_core.data.streaming.tars import TarShard, TarStream, stream_tars
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder, sha256_file
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.step import sampled_latents
from tests.support.batches import assert_held_batches_stay
from tests.support.trainings import cut_back, narrow, same

SHAPE, ROWS = (4, 2, 2), 300
HALVES = ("fp16", "bf16")
SIGNIFICANT = {"fp16": 11, "bf16": 8}  # bits of a number, the leading one included
LEAST_STD, MOST_STD = np.exp(-15), np.exp(10)  # diffusers clamps the logarithm of a variance to -30..20


def posteriors(number: int, seed: int = 0) -> np.ndarray:
    """Means of a few units, and standard deviations between the ends of an AutoencoderKL."""
    rng = np.random.default_rng(seed)
    means = rng.normal(0, 5, (number, 2, *SHAPE))
    stds = np.exp(rng.uniform(-15, 1, (number, 2, *SHAPE)))
    return np.stack([means, stds], axis=2).astype(np.float32)


def write_shard(path: Path, store: str, posterior: np.ndarray, at_once: int = 1 << 30, shard: int = 0) -> LatentShard:
    info = LatentInfo("vae@0", LatentScale(0.7), 16, SHAPE, f"images-{shard:05d}.tar", store)
    with LatentShardWriter(path, info) as writer:
        for first in range(0, len(posterior), at_once):
            rows = np.arange(first, min(first + at_once, len(posterior)))
            writer.write([f"{row:08d}" for row in rows], rows, posterior[rows])
    return LatentShard(path)


# --- numbers


@pytest.mark.parametrize("store", HALVES)
def test_every_number_survives_widening_and_narrowing(store: str) -> None:
    numbers = NUMBER_FORMATS[store]
    every = np.arange(1 << 16, dtype=np.uint16).view(numbers.array)
    wide = numbers.widened(every)
    assert wide.dtype == np.float32
    finite = np.isfinite(wide)
    assert (~finite).sum() == 2 ** SIGNIFICANT[store]  # one exponent, with both signs
    assert numbers.narrowed(wide[finite], "").tobytes() == every[finite].tobytes()
    assert np.array_equal(numbers.tensor_of(every).float().numpy(), wide, equal_nan=True)
    assert numbers.array_of(numbers.tensor_of(every)).tobytes() == every.tobytes()


@pytest.mark.parametrize("store", HALVES)
def test_rounding_takes_the_nearest_number(store: str) -> None:
    """No representable number is nearer, and of two that are equally near the even one is taken."""
    numbers, rng = NUMBER_FORMATS[store], np.random.default_rng(0)
    every = numbers.widened(np.arange(1 << 15, dtype=np.uint16).view(numbers.array))
    every = every[np.isfinite(every)].astype(np.float64)  # those that are not negative, in order
    values = np.exp(rng.uniform(-18, 11, 20_000)).astype(np.float32)
    above = np.searchsorted(every, values)
    nearest = np.minimum(np.abs(every[above] - values), np.abs(every[above - 1] - values))
    for sign in (1, -1):
        rounded = numbers.widened(numbers.narrowed(sign * values, ""))
        assert np.array_equal(np.abs(rounded.astype(np.float64) - sign * values), nearest)
    middle = ((every[1000:1100] + every[1001:1101]) / 2).astype(np.float32)
    assert not (numbers.narrowed(middle, "").view(np.uint16) % 2).any()


@pytest.mark.parametrize("store", HALVES)
def test_a_standard_deviation_of_an_autoencoder_is_in_range(store: str) -> None:
    """None becomes 0 or infinite; below float16's normal numbers the error is less than that of a mean of 1e-4."""
    numbers = NUMBER_FORMATS[store]
    std = np.exp(np.linspace(-15, 10, 5001)).astype(np.float32)
    error = np.abs(numbers.widened(numbers.narrowed(std, "")) - std)
    assert (numbers.widened(numbers.narrowed(std, "")) > 0).all()
    assert (error <= np.maximum(std * 2.0 ** -SIGNIFICANT[store], 2.0**-25)).all()
    assert not numbers.widened(numbers.narrowed(np.zeros(3, np.float32), "")).any()  # of deterministic encoders


@pytest.mark.parametrize(("store", "value", "remedy"), [("fp16", 65520.0, "bf16 or fp32"), ("bf16", 3.4e38, "fp32")])
@pytest.mark.parametrize("place", [(0, 0), (1, 1)])
def test_a_latent_out_of_range_is_refused(
    store: str, value: float, remedy: str, place: tuple[int, int], tmp_path: Path
) -> None:
    rows = posteriors(3)
    rows[(2, *place, 3, 1, 1)] = value
    with pytest.raises(UserError, match=rf"the latents of images-00000\.tar reach .*set encode\.store={remedy}$"):
        write_shard(tmp_path / "l.arrow", store, rows)
    assert not list(tmp_path.iterdir())
    rows[(2, *place, 3, 1, 1)] = torch.finfo(NUMBER_FORMATS[store].tensor).max
    assert np.isfinite(write_shard(tmp_path / "l.arrow", store, rows).posterior()).all()


@pytest.mark.parametrize("store", NUMBER_FORMATS)
def test_what_is_not_finite_is_found(store: str) -> None:
    dtype = NUMBER_FORMATS[store].tensor
    values = torch.full((2, 2, *SHAPE), torch.finfo(dtype).max / 64, dtype=dtype)
    assert all_finite(values)
    for bad in (float("inf"), -float("inf"), float("nan")):
        spoiled = values.clone()
        spoiled[1, 0, 3, 1, 1] = bad
        assert not all_finite(spoiled)
        batch = LatentBatch(7, np.array([4, 5]), np.zeros(2, np.bool_), spoiled, torch.zeros(2, dtype=torch.long))
        with pytest.raises(UserError, match=r"1 latents of step 7 are not finite \(rows 5\)"):
            require_finite(batch)
    require_finite(replace(batch, posterior=torch.full_like(values, torch.finfo(dtype).max)))  # its sum overflows


# --- shards


@pytest.mark.parametrize("store", HALVES)
def test_a_shard_has_half_the_bytes_and_each_rows_largest_error(store: str, tmp_path: Path) -> None:
    posterior = posteriors(ROWS)
    shard = write_shard(tmp_path / "half.arrow", store, posterior, at_once=7)
    write_shard(tmp_path / "at_once.arrow", store, posterior)
    assert (tmp_path / "half.arrow").read_bytes() == (tmp_path / "at_once.arrow").read_bytes()
    kept = shard.posterior()
    bound = np.maximum(np.abs(posterior) * 2.0 ** -SIGNIFICANT[store], 2.0**-25)
    assert (np.abs(kept - posterior) <= bound).all()
    assert not np.array_equal(kept, posterior)
    assert np.array_equal(shard.rounding, np.abs(kept - posterior).max((1, 4, 5)))
    assert (shard.info.store, shard.info.schema_version) == (store, "4")
    numbers = ROWS * 2 * 2 * int(np.prod(SHAPE))
    whole = write_shard(tmp_path / "whole.arrow", "fp32", posterior)
    assert not whole.rounding.any()
    saved = (tmp_path / "whole.arrow").stat().st_size - (tmp_path / "half.arrow").stat().st_size
    assert saved == pytest.approx(2 * numbers - ROWS * 2 * SHAPE[0] * 4, abs=2000)


def test_rows_that_were_rounded_before_keep_their_error(tmp_path: Path) -> None:
    posterior = posteriors(5)
    first = write_shard(tmp_path / "first.arrow", "fp16", posterior)
    with LatentShardWriter(tmp_path / "again.arrow", first.info) as writer:
        writer.write(first.keys.to_pylist(), first.labels, first.posterior(), first.rounding)
    assert (tmp_path / "again.arrow").read_bytes() == (tmp_path / "first.arrow").read_bytes()


def test_the_counts_state_the_largest_error_of_all_means_and_of_all_deviations() -> None:
    shards = [np.array([[1.0, 4.0], [0.5, 0.0]], np.float32), np.array([[2.0, 0.5], [0.25, 0.125]], np.float32)]
    error = store_error(shards, np.array([2.0, 8.0]))
    assert error == {"mean": {"max": 4.0, "in_std": 1.0}, "std": {"max": 0.5, "in_std": 0.25}}
    assert store_error(shards, np.array([0.0, 8.0]))["mean"] == {"max": 4.0, "in_std": 0.5}  # a constant channel


@pytest.mark.parametrize("store", HALVES)
def test_statistics_are_those_of_what_is_stored(store: str, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "l.arrow", store, posteriors(ROWS))
    mean, std = (shard.posterior()[:, 0, k].astype(np.float64) for k in (0, 1))
    sums, number = channel_sums(shard), ROWS * SHAPE[1] * SHAPE[2]
    assert np.allclose(sums["total"] / number, mean.mean((0, 2, 3)), rtol=1e-9)
    spread = np.sqrt((mean**2 + std**2).mean((0, 2, 3)) - mean.mean((0, 2, 3)) ** 2)
    assert np.allclose(deviation(sums["total"] / number, sums["squares"] / number), spread, rtol=1e-9)


def test_shards_that_contradict_what_they_state_are_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "l.arrow", "fp16", posteriors(3))
    with pa.OSFile(str(tmp_path / "l.arrow")) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
    for store, problem in (("bf16", "uint16"), ("fp32", "a latent shard has"), ("fp8", "is not a latent shard")):
        metadata = {**shard.info.to_metadata(), b"store": json.dumps(store).encode()}
        if store == "fp32":
            metadata = replace(shard.info, store="fp32").to_metadata()
        schema = latent_schema(shard.info).with_metadata(metadata)
        with pa.OSFile(str(tmp_path / "other.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(batch.columns, schema=schema))
        with pytest.raises(UserError, match=problem):
            LatentShard(tmp_path / "other.arrow")


def test_shards_of_two_precisions_do_not_mix(tmp_path: Path) -> None:
    for k, store in enumerate(("fp16", "bf16")):
        write_shard(tmp_path / f"{k}.arrow", store, posteriors(3), shard=k)
    with pytest.raises(UserError, match="was encoded as"):
        LatentDataset([tmp_path / "0.arrow", tmp_path / "1.arrow"])


# --- readers


@pytest.fixture(params=NUMBER_FORMATS)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LatentDataset, TarStream]:
    """The same rows, row i with label i, as Arrow shards and as tars."""
    paths, tars, everything = [], [], posteriors(ROWS + 40)
    for k, rows in enumerate((slice(0, ROWS), slice(ROWS, ROWS + 40))):
        paths.append(tmp_path / f"{k}.arrow")
        info = LatentInfo("vae@0", LatentScale(0.7), 16, SHAPE, f"images-{k:05d}.tar", request.param)
        numbers = np.arange(rows.start, rows.stop)
        with LatentShardWriter(paths[-1], info) as writer:
            writer.write([f"{number:08d}" for number in numbers], numbers, everything[rows])
        count = write_latent_tar(tmp_path / f"{k}.tar", LatentShard(paths[-1]))
        tars.append(TarShard(Folder.at(tmp_path), f"{k}.tar", count, sha256_file(tmp_path / f"{k}.tar")))
    return LatentDataset(paths), TarStream(tuple(tars), SHAPE, LatentScale(0.7), 50, request.param)


PLAN = BatchPlan(seed=3, global_batch_size=24, mirror_prob=0.5)


def taken(batches: Iterator[LatentBatch], steps: int) -> list[LatentBatch]:
    with closing(batches):  # type: ignore[type-var]
        return list(islice(batches, steps))


def test_both_readers_give_the_same_bits_and_the_same_draws(both: tuple[LatentDataset, TarStream]) -> None:
    dataset, stream = both
    everything, noise = posteriors(ROWS + 40), torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(0))
    numbers = dataset.info.numbers
    for reader in (latent_batches(dataset, PLAN), stream_tars(stream, PLAN)):
        for batch in taken(reader, 20):
            rows, sides = batch.labels.numpy(), batch.mirror.astype(int)
            expected = numbers.narrowed(everything[rows, sides], "")
            assert batch.posterior.dtype == numbers.tensor
            assert numbers.array_of(batch.posterior).tobytes() == expected.tobytes()
            latents = sampled_latents(batch, noise, LatentScale(0.7))
            wide = numbers.widened(expected)
            assert latents.dtype == torch.float32
            assert np.array_equal(latents, (wide[:, 0] + wide[:, 1] * noise.numpy()) * np.float32(0.7))


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_batches_of_one(both: tuple[LatentDataset, TarStream], world_size: int) -> None:
    whole = taken(latent_batches(both[0], PLAN), 20)
    plans = [replace(PLAN, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [taken(latent_batches(both[0], plan, 5), 15) for plan in plans]
    for step, batch in enumerate(whole[5:]):
        assert torch.equal(torch.cat([batches[step].posterior for batches in parts]), batch.posterior)


def test_a_batch_in_use_is_not_overwritten(both: tuple[LatentDataset, TarStream]) -> None:
    with closing(latent_batches(both[0], PLAN)) as batches:
        assert_held_batches_stay(batches)


def test_a_tar_of_another_precision_is_refused(both: tuple[LatentDataset, TarStream]) -> None:
    other = replace(both[1], store="bf16" if both[1].store == "fp16" else "fp16")
    with pytest.raises(UserError, match=rf"not {NUMBER_FORMATS[other.store].array} \(2, 2, 4, 2, 2\)"):
        taken(stream_tars(other, PLAN), 1)


# --- training


@pytest.mark.usefixtures("quickly", "one_thread", "no_thread_stays")
@pytest.mark.parametrize("store", HALVES)
def test_a_training_resumes_and_is_that_of_the_widened_latents(
    store: str, latents_artifact: Artifact, tmp_path: Path
) -> None:
    """Bit for bit: stored in half precision, or in float32 after it was rounded."""
    data: dict[str, LatentDataset] = {}
    for name in (store, "fp32"):
        paths = []
        for k, path in enumerate(latents_artifact.paths("*.arrow")):
            shard, paths = LatentShard(path), [*paths, tmp_path / f"{name}-{k}.arrow"]
            numbers = NUMBER_FORMATS[store]
            rounded = numbers.widened(numbers.narrowed(shard.posterior(), ""))
            with LatentShardWriter(paths[-1], replace(shard.info, store=name)) as writer:
                writer.write(shard.keys.to_pylist(), shard.labels, rounded)
        data[name] = LatentDataset(paths)
    config = TrainConfig(
        model="EDT-Tiny/2", global_batch_size=8, max_steps=4, lr=2e-3, checkpoint_every=2, log_every=1, ema_decay=0.9
    )
    whole = train(config, narrow(), data[store], LocalContext(tmp_path / "a"))
    wide = train(config, narrow(), data["fp32"], LocalContext(tmp_path / "b"))
    resumed = train(config, narrow(), data[store], cut_back(tmp_path / "a", tmp_path / "c", 2))
    assert same(whole.model.state_dict(), wide.model.state_dict())
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert whole.history == wide.history == resumed.history
