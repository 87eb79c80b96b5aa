"""Held-out rows and tokens of streamed shards: never trained on, measured as with mapped shards, tokens of each row."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.data.batches import without
from edt_core.data.latents import LatentDataset
from edt_core.data.latents.tokens import TokenTable
from edt_core.data.scale import LatentScale
from edt_core.data.streaming import ShardStream
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.ranks import Ranks
from edt_core.training.state import initial_model
from edt_core.training.validation.measure import HeldOutLoss
from tests.edt_core.test_streaming_shards import BATCH, latents, rows, stream, stream_of, take
from tests.support.holdouts import some_held_out
from tests.support.trainings import contents, cut_back, narrow, place

SIZES = (5, 0, 17, 30, 1, 24, 13)
TOKENS = (4, 3)
CONFIG = TrainConfig(
    reader="stream",
    global_batch_size=8,
    num_canonical_nodes=2,
    shuffle_block=1,
    max_steps=4,
    checkpoint_every=2,
    log_every=1,
    validate_every=2,
    holdout=0.2,
    masked_loss=False,
    lr=1e-3,
)


def held_of(total: int) -> np.ndarray:
    """A third of the rows, the only one of the fifth shard among them."""
    others = np.delete(np.arange(total), sum(SIZES[:4]))
    held: np.ndarray = np.random.default_rng(1).choice(others, total // 3 - 1, replace=False)
    return np.union1d(held, [sum(SIZES[:4])])


def without_held(shards: ShardStream) -> tuple[ShardStream, np.ndarray]:
    held = held_of(len(shards))
    part = without(shards, held)
    assert isinstance(part, ShardStream)
    return part, held


def with_tokens(sizes: Sequence[int], folder: Path) -> tuple[ShardStream, TokenTable]:
    """A stream with files of tokens beside its shards, and all tokens; those of row i and side j begin with i and j."""
    shards = stream(sizes, str(folder / "latents"))
    out = ArtifactWriter(Folder.at(folder / "both"), "latents", "1" * 64)
    start = 0
    for k, entry in enumerate(shards.entries):
        size = entry.rows or 0
        values = np.zeros((size, 2, *TOKENS), np.float16)
        values[:, :, 0, 0], values[:, 1, 0, 1] = np.arange(start, start + size)[:, None], 1
        data = shards.artifact.path(entry.path).read_bytes()
        out.write(entry.path, lambda path, data=data, size=size: path.write_bytes(data) and size)
        with_values = lambda path, values=values: np.save(path, values)  # noqa: E731
        out.write(f"tokens-{k:05d}.npy", with_values)
        start += size
    artifact = out.commit({}, {}, {})
    both = replace(
        shards,
        artifact=artifact,
        entries=tuple(artifact.entries("*.arrow")),
        tokens=tuple(artifact.entries("*.npy")),
    )
    return both, TokenTable(artifact.paths("*.npy"))


def test_an_epoch_has_each_row_that_is_not_held_out_once(tmp_path: Path) -> None:
    whole = stream(SIZES, str(tmp_path))
    shards, held = without_held(whole)
    assert len(shards) == len(whole) - len(held)
    assert len(shards.streamed_rows(4)) == 0
    batches = take(shards, 10)  # 60 rows: five batches an epoch
    kept = np.setdiff1d(np.arange(len(whole)), held)
    assert [sorted(rows(batches[start : start + 5])) for start in (0, 5)] == [kept.tolist()] * 2
    assert all(np.array_equal(batch.labels.numpy(), batch.indices) for batch in batches)
    mapped = LatentDataset([shards.artifact.path(entry.path) for entry in shards.entries])
    for batch in batches[:4]:
        posterior, _ = mapped.gather(batch.indices, batch.mirror)
        assert np.array_equal(batch.posterior.numpy(), posterior)


def test_batches_are_the_same_on_any_number_of_ranks_and_from_any_step(tmp_path: Path) -> None:
    shards, _ = without_held(stream(SIZES, str(tmp_path)))
    whole = rows(take(shards, 12))
    for world_size in (2, 3, 5):
        parts = [take(shards, 5, 7, rank, world_size) for rank in range(world_size)]
        together = [row for step in zip(*parts, strict=True) for batch in step for row in batch.indices.tolist()]
        assert together == whole[7 * BATCH :]


def test_no_held_out_rows_is_the_stream_as_it_was(tmp_path: Path) -> None:
    shards = stream(SIZES, str(tmp_path))
    assert rows(take(shards.without(np.empty(0, np.int64)), 9)) == rows(take(shards, 9))
    assert [shards.streamed_rows(k).tolist() for k in range(len(SIZES))] == [list(range(size)) for size in SIZES]


def test_rows_are_read_from_their_shards_in_the_requested_order(tmp_path: Path) -> None:
    shards, held = without_held(stream_of(latents(SIZES, str(tmp_path), "fp16"), store="fp16"))
    wanted = np.random.default_rng(2).permutation(held)
    mapped = LatentDataset([shards.artifact.path(entry.path) for entry in shards.entries])
    posterior, labels = mapped.gather(wanted, np.zeros(len(wanted), np.bool_))
    found, of_found = shards.gather(wanted)
    assert found.dtype == np.float16
    assert np.array_equal(found, posterior)
    assert labels.tolist() == of_found.tolist() == wanted.tolist() == shards.labels(wanted).tolist()


def test_tokens_are_those_of_the_rows_and_sides_of_a_batch(tmp_path: Path) -> None:
    both, table = with_tokens(SIZES, tmp_path)
    shards, _ = without_held(both)
    for rank in range(2):
        for batch in take(shards, 20, 3, rank, 2):
            assert batch.tokens is not None
            assert np.array_equal(batch.tokens.numpy(), table.gather(batch.indices, batch.mirror))
    plain = replace(both, tokens=())
    assert rows(take(both, 5)) == rows(take(plain, 5))
    share = slice(0, BATCH)
    assert both.disk_bytes(share, BATCH) == plain.disk_bytes(share, BATCH) + sum(
        entry.bytes for entry in both.tokens if entry.bytes
    )


def test_tokens_of_another_number_of_rows_are_refused(tmp_path: Path) -> None:
    shards, _ = with_tokens((8, 9), tmp_path)
    with pytest.raises(UserError, match="has 9 rows of tokens for 8 of its latents"):
        replace(shards, tokens=shards.tokens[::-1]).open([0])


def stream_of_artifact(artifact: Artifact) -> ShardStream:
    return ShardStream(artifact, tuple(artifact.entries("*.arrow")), (4, 8, 8), LatentScale(0.5), 2, 1)


def test_the_held_out_loss_has_the_bits_of_mapped_shards(latents_artifact: Artifact, dataset: LatentDataset) -> None:
    weights = initial_model(narrow(), 0).state_dict()
    shards = stream_of_artifact(latents_artifact)
    measured = [
        HeldOutLoss(CONFIG, narrow(), latents, some_held_out(), Ranks()).measure(weights)
        for latents in (dataset, shards)
    ]
    assert measured[0] == measured[1]


@pytest.mark.usefixtures("quickly")
def test_a_training_with_held_out_rows_resumes_exactly(
    latents_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, seen = some_held_out(), []
    shards = stream_of_artifact(latents_artifact)
    check = "edt_core.training.loop.require_finite"
    monkeypatch.setattr(check, lambda batch: seen.extend(batch.indices.tolist()))
    whole = train(CONFIG, narrow(), shards, LocalContext(tmp_path / "a"), None, held)
    assert [row["step"] for row in whole.history.rows if "holdout_loss" in row] == [2, 4]
    assert len(seen) >= 4 * 8
    assert not set(seen) & set(held.rows.tolist())
    train(CONFIG, narrow(), shards, cut_back(tmp_path / "a", tmp_path / "b", 2), None, held)
    assert contents(place(tmp_path / "b", 4)) == contents(place(tmp_path / "a", 4))
    cursor = (place(tmp_path / "a", 4) / "state.json").read_text()
    assert f'"num_samples": {96 - len(held.rows)}' in cursor


@pytest.mark.usefixtures("quickly")
def test_a_training_aligns_with_the_tokens_of_a_stream_as_with_mapped_ones(
    latents_artifact: Artifact, tmp_path: Path
) -> None:
    """One shard in one block, whose order is then the only difference: the terms of the first step are compared."""
    out = ArtifactWriter(Folder.at(tmp_path / "tokens"), "latents", "2" * 64)
    values = torch.randn(96, 2, 16, 6, generator=torch.Generator().manual_seed(0)).half().numpy()
    for k, (path, part) in enumerate(zip(latents_artifact.paths("*.arrow"), (slice(40), slice(40, 96)), strict=True)):
        data, size = path.read_bytes(), part.stop - (part.start or 0)
        out.write(f"latents-{k:05d}.arrow", lambda target, data=data, size=size: target.write_bytes(data) and size)
        out.write(f"tokens-{k:05d}.npy", lambda target, part=part: np.save(target, values[part]))
    artifact = out.commit({}, {}, {})
    tokens = tuple(artifact.entries("*.npy"))
    shards = replace(stream_of_artifact(artifact), tokens=tokens)
    aligned = {"align": "features", "align_features": (4, 6), "align_block": 1, "holdout": 0.0, "validate_every": None}
    config = CONFIG.model_copy(update=aligned)
    streamed = train(config, narrow(), shards, LocalContext(tmp_path / "a"))
    table = TokenTable(artifact.paths("*.npy"))
    beside = train(config, narrow(), stream_of_artifact(artifact), LocalContext(tmp_path / "b"), tokens=table)
    assert streamed.history.rows == beside.history.rows
    assert all(row["align"] > 0 for row in streamed.history.rows)
