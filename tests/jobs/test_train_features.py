"""Tokens of a feature network: stored beside the latents by encode, and read by a training that aligns with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.config import EncodeConfig, TrainConfig
from edt_core.data.latents.tokens import TokenTable, write_tokens
from edt_core.data.shards import read_image_shard
from edt_core.errors import UserError
from edt_core.evaluation.extractors.dinov2 import PatchTokens
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import Folder
from jobs.stages import encode, train
from jobs.stages.extractors import extractor_source
from pipelines.config.schema import load_config
from pipelines.pipeline import Published
from pipelines.setup.disk import disk_needs
from tests.support.jobs import TRAIN, Chain, execute
from tests.support.local_training import checkpoint_steps, trained_here
from tests.support.models import dinov2_folder
from tests.support.trainings import contents, place

pytest.importorskip("transformers", reason="transformers, the extra [dinov2], is not installed")
ALIGNED = TRAIN.model_copy(
    update={"align": "features", "align_features": (16, 32), "max_steps": 4, "checkpoint_every": 2, "log_every": 1}
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dinov2_folder(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def network(weights: Path) -> Source:
    return extractor_source("dinov2", str(weights))


@pytest.fixture(scope="module")
def latents(chain: Chain, network: Source, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from tests.support.local_ray import local_ray

    inputs: dict[str, Any] = {"images": chain["images"], "autoencoder": chain["autoencoder"], "dinov2": network}
    with local_ray():
        return execute(encode.STAGE, EncodeConfig(batch_size=5), tmp_path_factory.mktemp("latents"), None, **inputs)


def test_rows_are_the_tokens_of_image_and_mirror_image(chain: Chain, latents: Artifact, weights: Path) -> None:
    network = PatchTokens.load(weights)
    table = TokenTable(latents.paths("tokens-*.npy"))
    assert len(table) == 32
    first = 0
    for path in chain["images"].paths("images-*.tar"):
        pixels = np.stack([sample.pixels() for sample in read_image_shard(path)])
        rows = np.arange(first, first + len(pixels))
        for side, view in enumerate((pixels, pixels[:, :, ::-1].copy())):
            found = table.gather(rows, np.full(len(rows), bool(side)))
            assert (found.dtype, found.shape) == (np.float16, (len(rows), 256, 32))
            np.testing.assert_allclose(found.astype(np.float32), network(view)["tokens"], rtol=2e-3, atol=2e-3)
        first += len(pixels)
    one, other = (table.gather(np.array([25, 3]), np.array(mirror)) for mirror in ([False, True], [True, True]))
    assert np.array_equal(one[1], other[1])
    assert not np.array_equal(one[0], other[0])


def test_latents_are_the_same_and_the_manifest_states_the_tokens(chain: Chain, latents: Artifact) -> None:
    names = [entry.path for entry in latents.entries("latents-*.arrow")]
    assert names == [entry.path for entry in chain["latents"].entries("latents-*.arrow")]
    assert [e.sha256 for e in latents.entries("*.arrow")] == [e.sha256 for e in chain["latents"].entries("*.arrow")]
    assert latents.counts["tokens"] == [256, 32]
    assert "tokens" not in chain["latents"].counts
    assert not chain["latents"].entries("tokens-*")
    assert latents.fingerprint != chain["latents"].fingerprint
    assert latents.manifest.inputs.keys() == {"images", "autoencoder", "dinov2"}


def test_a_training_aligns_with_them_and_resumes(latents: Artifact, tmp_path: Path) -> None:
    whole = trained_here(ALIGNED, latents, tmp_path / "a", "one")
    rows = train.history(whole)
    assert [row["align"] > 0 for row in rows] == [True] * 4
    assert all(row["loss_full"] == pytest.approx(row["mse"] + row["vb"] + row["align"], rel=1e-6) for row in rows)
    data = tmp_path / "a" / "one"
    assert checkpoint_steps(data) == {2, 4}
    short = ALIGNED.model_copy(update={"max_steps": 4})
    (tmp_path / "b").mkdir()
    import shutil

    shutil.copytree(data, tmp_path / "b" / "one")
    shutil.rmtree(place(tmp_path / "b" / "one", 4))
    again = trained_here(short, latents, tmp_path / "b", "two", ("one",))
    assert again.counts["final"] == whole.counts["final"]
    assert contents(place(tmp_path / "b" / "two", 4)) == contents(place(data, 4))


def test_latents_without_tokens_or_with_others_are_refused(chain: Chain, latents: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokens of a feature network; encode again with --dinov2-weights"):
        trained_here(ALIGNED, chain["latents"], tmp_path / "a")
    other = ALIGNED.model_copy(update={"align_features": (16, 768)})
    with pytest.raises(UserError, match=r"has 256 of width 32; set train\.align_features to \[16, 32\]"):
        trained_here(other, latents, tmp_path / "b")


def test_a_pipeline_gives_the_network_to_encode_alone(weights: Path) -> None:
    fields = ["train.align=features", "train.align_features=[16,32]"]
    config = load_config("quickstart", [*fields, f"dinov2.weights={weights}"])
    published = Published.of(config, None)
    assert published.tokens.keys() == {"dinov2"}
    assert published.extractors == {}
    assert load_config("quickstart", []).token_spaces() == ()
    with pytest.raises(UserError, match=r"dinov2\.weights is not set"):
        Published.of(load_config("quickstart", fields), None)
    plain = disk_needs(load_config("quickstart", []), 1000, 10)["latents"]
    assert disk_needs(config, 1000, 10)["latents"] == plain + 1000 * 2 * 2 * 256 * 32


def test_files_of_tokens_are_whole_and_finite(tmp_path: Path) -> None:
    batches = [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8)]

    def network(pixels: np.ndarray, value: float = 1.0) -> np.ndarray:
        return np.full((len(pixels), 4, 2), value, np.float32)

    assert write_tokens(tmp_path / "a.npy", batches, 3, network) == 3
    assert TokenTable([tmp_path / "a.npy"] * 2).gather(np.array([4]), np.array([True])).tolist() == [[[1.0, 1.0]] * 4]
    with pytest.raises(UserError, match="more images than the 2"):
        write_tokens(tmp_path / "b.npy", batches, 2, network)
    with pytest.raises(UserError, match="not finite in float16"):
        write_tokens(tmp_path / "c.npy", batches, 3, lambda pixels: network(pixels, 1e6))
    np.save(tmp_path / "d.npy", np.zeros((3, 2, 4, 2), np.float32))
    with pytest.raises(UserError, match="and tokens are float16"):
        TokenTable([tmp_path / "d.npy"])
    (tmp_path / "e.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a file of tokens"):
        TokenTable([tmp_path / "e.npy"])
    assert Folder.at(tmp_path).names()
    assert TrainConfig().align_features == (16, 768)
