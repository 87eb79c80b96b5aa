"""The training loop without Ray: exact resumption, draws that do not know ranks, Adan as published."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.artifact import Artifact
from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset, LatentShard, write_latent_tar
from edt_core.data.loader import LatentBatch
from edt_core.data.streaming import LatentStream, TarShard
from edt_core.models import ModelConfig, mask_sites, model_config
from edt_core.storage import Folder, sha256_file
from edt_core.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_checkpoint,
    checkpoint_name,
    ema_model,
    load_checkpoint,
    newest_checkpoint,
)
from edt_core.training.context import LocalContext, TrainContext
from edt_core.training.draws import StepDraws, draw_step
from edt_core.training.loop import TrainState, initial_model, prepared_steps, train
from edt_core.training.optim import learning_rate, make_optimizer

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=16,
    max_steps=12,
    lr=2e-3,
    ema_decay=0.9,
    log_every=3,
    checkpoint_every=4,
)
DRAWN = TrainConfig(global_batch_size=8, seed=3, class_dropout_prob=0.5)


@pytest.fixture(scope="module")
def edt() -> ModelConfig:
    return model_config("EDT-Tiny/2", 32, 4)


@pytest.fixture(scope="module")
def dataset(latents_artifact: Artifact) -> LatentDataset:
    return LatentDataset(latents_artifact.paths("*.arrow"))


def run(
    config: TrainConfig, edt: ModelConfig, dataset: LatentDataset, folder: Path, resume: Path | None = None
) -> TrainState:
    return train(config, edt, dataset, LocalContext(folder), resume)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_training_equals_an_uninterrupted_one(
    edt: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    whole = run(CONFIG, edt, dataset, tmp_path / "whole")
    for step in (4, 8):  # 4 is in the middle of an epoch and of a window of the history
        resumed = run(CONFIG, edt, dataset, tmp_path / f"from{step}", tmp_path / "whole" / checkpoint_name(step))
        assert same(whole.model.state_dict(), resumed.model.state_dict())
        assert same(whole.ema.state_dict(), resumed.ema.state_dict())
        assert resumed.history == whole.history
    last = [tmp_path / name / checkpoint_name(12) / "ema.safetensors" for name in ("whole", "from8")]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"timestep_sampler": "uniform"}, {"masked_loss": False}])
def test_every_option_trains_and_resumes(
    options: dict[str, object], edt: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={**options, "max_steps": 6, "checkpoint_every": 3})
    whole = run(config, edt, dataset, tmp_path / "a")
    resumed = run(config, edt, dataset, tmp_path / "b", tmp_path / "a" / checkpoint_name(3))
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert ("loss_masked" in whole.history[-1]) == config.masked_loss


def test_the_loss_falls(edt: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    state = run(CONFIG.model_copy(update={"max_steps": 90, "checkpoint_every": 90}), edt, dataset, tmp_path)
    losses = [row["loss_full"] for row in state.history]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_ema_is_what_is_sampled_from(edt: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    state = run(CONFIG, edt, dataset, tmp_path)
    model = ema_model(tmp_path / checkpoint_name(12))
    assert not model.training
    assert model.config == edt
    assert same(model.state_dict(), state.ema.state_dict())
    assert not same(model.state_dict(), state.model.state_dict())


def test_the_ema_follows_its_recursion(edt: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": 3, "checkpoint_every": 1})
    run(config, edt, dataset, tmp_path)
    name = "blocks.0.mlp.fc1.weight"
    expected = initial_model(edt, 0).state_dict()[name]
    for step in (1, 2, 3):
        checkpoint = load_checkpoint(tmp_path / checkpoint_name(step))
        expected = 0.9 * expected + 0.1 * checkpoint.model[name]
        assert torch.allclose(checkpoint.ema[name], expected, rtol=1e-5, atol=1e-7)


def test_draws_of_ranks_are_slices_of_the_global_batch(edt: ModelConfig) -> None:
    whole = draw_step(DRAWN.model_copy(update={"global_batch_size": 24}), 5, edt)
    for world_size in (1, 2, 3, 4):
        parts = [whole.slice(rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.posterior_noise for part in parts]), whole.posterior_noise)
        assert torch.equal(torch.cat([part.noise for part in parts], dim=1), whole.noise)
        assert torch.equal(torch.cat([part.drop_label for part in parts], dim=1), whole.drop_label)
        for site in range(len(mask_sites(edt))):
            assert torch.equal(torch.cat([part.masks[site] for part in parts]), whole.masks[site])


def test_draws_are_a_function_of_seed_and_step(edt: ModelConfig) -> None:
    first, again, later = (draw_step(DRAWN, step, edt) for step in (5, 5, 6))
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, later.noise)
    assert not torch.equal(first.noise[0], first.noise[1])  # the masked pass has noise of its own


class _Poisoned(LatentDataset):
    """A data set of which one row is not a number."""

    def gather(self, indices, mirror, out=None):
        posterior, labels = super().gather(indices, mirror, out)
        posterior[indices == 17, 0] = np.nan
        return posterior, labels


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(
    edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path
) -> None:
    poisoned = _Poisoned(latents_artifact.paths("*.arrow"))
    with pytest.raises(FloatingPointError, match=r"step \d+ is not finite for 1 of 16 samples \(rows \[17\]"):
        run(CONFIG, edt, poisoned, tmp_path)


@pytest.fixture(scope="module")
def stream(latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> LatentStream:
    """The same latents as tars."""
    folder, shards = tmp_path_factory.mktemp("tars"), []
    for path in latents_artifact.paths("*.arrow"):
        rows = write_latent_tar(folder / f"{path.stem}.tar", LatentShard(path))
        shards.append(TarShard(Folder.at(folder), f"{path.stem}.tar", rows, sha256_file(folder / f"{path.stem}.tar")))
    return LatentStream(tuple(shards), (4, 8, 8), 0.5, shuffle_buffer=64)


def test_a_streamed_training_learns_and_goes_on(edt: ModelConfig, stream: LatentStream, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"reader": "webdataset", "max_steps": 60, "checkpoint_every": 20})
    whole = train(config, edt, stream, LocalContext(tmp_path / "a"), None)
    losses = [row["loss_full"] for row in whole.history]
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    resumed = train(config, edt, stream, LocalContext(tmp_path / "b"), tmp_path / "a" / checkpoint_name(40))
    assert resumed.step == 60
    assert [row["step"] for row in resumed.history] == [row["step"] for row in whole.history]


@dataclass
class _Pair:
    """A context of one of two workers; every rank sees the losses of its own alone, twice."""

    rank: int
    world_size: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values.repeat(1, 2)

    def report(self, metrics: Mapping[str, float], checkpoint: Checkpoint | None) -> None:
        assert (checkpoint is None) == (self.rank > 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        assert self.rank == 0


def test_what_is_prepared_for_ranks_joins_to_the_global_batch(edt: ModelConfig, dataset: LatentDataset) -> None:
    def prepared(context: TrainContext) -> list[tuple[LatentBatch, StepDraws]]:
        return list(prepared_steps(CONFIG, edt, dataset, context, 5))

    whole, *ranks = (prepared(context) for context in (LocalContext(Path()), _Pair(0), _Pair(1)))
    assert [batch.step for batch, _ in whole] == list(range(5, 12))
    for (batch, draws), *parts in zip(whole, *ranks, strict=True):
        assert np.array_equal(np.concatenate([part.indices for part, _ in parts]), batch.indices)
        assert torch.equal(torch.cat([part.posterior for part, _ in parts]), batch.posterior)
        assert torch.equal(torch.cat([part.noise for _, part in parts], dim=1), draws.noise)


@pytest.mark.parametrize("reader", ["dataset", "stream"])
def test_a_worker_trains_on_its_share(reader: str, edt: ModelConfig, request: pytest.FixtureRequest) -> None:
    config = CONFIG.model_copy(update={"max_steps": 3})
    assert train(config, edt, request.getfixturevalue(reader), _Pair(1)).step == 3


def test_a_training_leaves_no_thread(edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        run(CONFIG, edt, _Poisoned(latents_artifact.paths("*.arrow")), tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "edt-prefetch"]


def test_the_rate_falls_linearly() -> None:
    config = TrainConfig(lr=1e-3, lr_final=5e-5, max_steps=400_000)
    assert learning_rate(config, 0) == 1e-3
    assert learning_rate(config, 200_000) == pytest.approx((1e-3 + 5e-5) / 2)
    assert learning_rate(config, 400_000) == pytest.approx(5e-5)


def adan_of_the_paper(
    theta: torch.Tensor, grads: list[torch.Tensor], lr: float, betas: tuple[float, float, float], eps: float
) -> torch.Tensor:
    """Algorithm 1 of arXiv 2208.06677 with the bias corrections of its section on implementation; weight decay 0.

    The betas here are the 1 - beta of the paper, as in its published code.
    """
    b1, b2, b3 = betas
    m = v = n = torch.zeros_like(theta)
    previous = grads[0]
    for k, g in enumerate(grads, start=1):
        difference = g - previous
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * difference
        n = b3 * n + (1 - b3) * (g + b2 * difference) ** 2
        scale = lr / ((n / (1 - b3**k)).sqrt() + eps)
        theta = theta - scale * (m / (1 - b1**k) + b2 * v / (1 - b2**k))
        previous = g
    return theta


def test_the_library_s_adan_is_the_paper_s() -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=rng, dtype=torch.float64)
    grads = [torch.randn(50, generator=rng, dtype=torch.float64) for _ in range(20)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer(TrainConfig(optimizer="adan", lr=1e-2), [parameter])
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    expected = adan_of_the_paper(start, grads, 1e-2, (0.98, 0.92, 0.99), 1e-8)
    assert torch.allclose(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    edt: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    run(CONFIG, edt, dataset, tmp_path)
    folders = [tmp_path / checkpoint_name(step) for step in (4, 8, 12)]
    weights = folders[2] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1  # one bit, which safetensors alone reads in silence
    weights.write_bytes(data)
    (folders[1] / "state.json").write_text("{")
    chosen, passed_over = newest_checkpoint(folders)
    assert chosen == folders[0]
    assert len(passed_over) == 2
    assert "step-00000012" in passed_over[0]
    with pytest.raises(CheckpointError, match="differs from its digest"):
        load_checkpoint(folders[2])


def test_a_checkpoint_without_its_manifest_is_none(edt: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    run(CONFIG, edt, dataset, tmp_path)
    folder = tmp_path / checkpoint_name(4)
    assert check_checkpoint(folder) == 4
    manifest = (folder / "checkpoint.json").read_bytes()
    for cut in range(0, len(manifest), 40):
        (folder / "checkpoint.json").write_bytes(manifest[:cut])
        with pytest.raises(CheckpointError):
            check_checkpoint(folder)


def test_the_optimizer_state_is_not_pickled(edt: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    run(CONFIG, edt, dataset, tmp_path)
    for path in (tmp_path / checkpoint_name(12)).iterdir():
        assert path.suffix in (".safetensors", ".json")
    checkpoint = load_checkpoint(tmp_path / checkpoint_name(12))
    assert {key.split(".", 1)[1] for key in checkpoint.optimizer} >= {
        "exp_avg",
        "exp_avg_sq",
        "exp_avg_diff",
        "previous_grad",
    }


def test_max_steps_zero_is_the_untrained_model(edt: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    state = run(CONFIG.model_copy(update={"max_steps": 0}), edt, dataset, tmp_path)
    assert same(state.ema.state_dict(), initial_model(edt, CONFIG.seed).state_dict())
    other = initial_model(edt, CONFIG.seed + 1)
    assert not same(state.ema.state_dict(), other.state_dict())


def test_xl_s_third_masking_site_trains(dataset: LatentDataset, tmp_path: Path) -> None:
    """The masks of a model with a site inside its first stage go through the fused pass."""
    tiny = model_config("EDT-Tiny/2", 32, 4)
    edt = replace(tiny, mid_mask_block=1)
    assert len(mask_sites(edt)) == 3
    state = run(CONFIG.model_copy(update={"max_steps": 2}), edt, dataset, tmp_path)
    assert state.step == 2
