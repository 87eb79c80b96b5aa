"""Equal trainings are equal bit for bit: resumed or not, by two processes or by one, however the batch is cut.

Run as a module, this file is one of the processes of a data-parallel training on the CPU.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.data.loader import BatchPlan, LatentBatch, latent_batches, require_finite
from edt_core.data.randomness import batch_indices
from edt_core.diffusion import LossSecondMomentSampler, linear_schedule
from edt_core.errors import Stopped
from edt_core.models import ModelConfig
from edt_core.store.artifact import Artifact
from edt_core.training import loop
from edt_core.training.checkpoint import Checkpoint, load_checkpoint
from edt_core.training.context import LocalContext, Request
from edt_core.training.draws import draw_step
from edt_core.training.loop import train
from edt_core.training.ranks import Ranks
from edt_core.training.state import initial_state, restore
from edt_core.training.step import StepInputs, accumulate_gradient, sampled_latents
from edt_core.training.store import CheckpointStore
from tests.support.cases import suite_of
from tests.support.gloo import run_ranks
from tests.support.holdouts import some_held_out
from tests.support.trainings import contents, cut_back, narrow, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=16,
    max_steps=12,
    lr=2e-3,
    ema_decay=(0.9, 0.5),
    log_every=3,
    checkpoint_every=4,
)
LAST = 8  # of the trainings of several processes: two steps more than an epoch
ELASTIC = CONFIG.model_copy(update={"max_steps": LAST, "log_every": 1, "num_workers": (1, 2), "preview_every": 4})


@pytest.fixture(scope="module")
def edt() -> ModelConfig:
    return narrow()


# --- resumed


@pytest.fixture(scope="module")
def whole(dataset: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, loop.TrainState]:
    """An uninterrupted training with a checkpoint after every step: epochs end at 6 and 12, rows at 3, 6, 9 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "matmul_rate", lambda *_: 1e9)
        config = CONFIG.model_copy(update={"checkpoint_every": 1})
        return folder, train(config, narrow(), dataset, LocalContext(folder))


# In mid-epoch and mid-row; at the end of a row and of an epoch; before the last step. The others are like these.
PLACES = (2, 6, 11)


@pytest.mark.parametrize("step", suite_of(PLACES, range(1, 12)))
def test_a_resumed_training_equals_an_uninterrupted_one(
    step: int, whole: tuple[Path, loop.TrainState], edt: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    """From every place: in the middle of an epoch, of a row of the history, and at their ends."""
    folder, state = whole
    config = CONFIG.model_copy(update={"checkpoint_every": 1})
    copy = tmp_path / "copy"
    context = cut_back(folder, copy, step)
    resumed = train(config, edt, dataset, context)
    assert context.warnings == []
    assert context.reported[0]["step"] == step // 3 * 3 + 3  # it did go on from there
    assert same(resumed.model.state_dict(), state.model.state_dict())
    for average, expected in zip(resumed.ema.averages, state.ema.averages, strict=True):
        assert same(average, expected)
    for name, value in state.timesteps.state_dict().items():
        assert np.array_equal(resumed.timesteps.state_dict()[name], value)
    assert resumed.history == state.history
    for later in range(step + 1, 13):
        assert contents(place(copy, later)) == contents(place(folder, later))
    optimizer = load_checkpoint(place(copy, 12)).tensors["optimizer.safetensors"]
    assert {name.split(".", 1)[1] for name in optimizer} >= {
        "exp_avg",
        "exp_avg_sq",
        "exp_avg_diff",
        "previous_grad",
    }


def test_two_trainings_of_a_seed_are_equal_and_of_two_seeds_are_not(
    whole: tuple[Path, loop.TrainState], edt: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    """Whatever was drawn before."""
    torch.manual_seed(987)
    np.random.seed(987)
    config = CONFIG.model_copy(update={"checkpoint_every": 1})
    train(config, edt, dataset, LocalContext(tmp_path / "again"))
    assert contents(place(tmp_path / "again", 12)) == contents(place(whole[0], 12))
    other = train(config.model_copy(update={"seed": 1}), edt, dataset, LocalContext(tmp_path / "other"))
    assert not same(other.model.state_dict(), whole[1].model.state_dict())


def test_a_sampler_that_has_learned_is_resumed_too(
    edt: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that remembers a single loss of each of 21 timesteps has seen them all before the end."""

    def forgetful(num_timesteps: int) -> LossSecondMomentSampler:
        return LossSecondMomentSampler(num_timesteps, history=1)

    monkeypatch.setattr("edt_core.diffusion.objective.LossSecondMomentSampler", forgetful)
    config = CONFIG.model_copy(update={"num_timesteps": 21})
    state = train(config, edt, dataset, LocalContext(tmp_path / "a"))
    checkpoint = load_checkpoint(place(tmp_path / "a", 8))
    assert (checkpoint.tensors["timesteps.safetensors"]["counts"] > 0).all()
    resumed = train(config, edt, dataset, cut_back(tmp_path / "a", tmp_path / "b", 8))
    assert same(resumed.model.state_dict(), state.model.state_dict())
    assert contents(place(tmp_path / "a", 12)) == contents(place(tmp_path / "b", 12))
    uniform = config.model_copy(update={"timestep_sampler": "uniform"})
    assert not same(
        train(uniform, edt, dataset, LocalContext(tmp_path / "c")).model.state_dict(), state.model.state_dict()
    )


# --- cut into micro-batches


@pytest.mark.parametrize("most", suite_of([5], [8, 5, 1]))
def test_any_cut_of_the_batch_trains_the_same(
    most: int, whole: tuple[Path, loop.TrainState], edt: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    seen: dict[int, int] = {}
    forward = type(whole[1].model).forward

    def counted(self: torch.nn.Module, x: torch.Tensor, *inputs: object) -> torch.Tensor:
        if not x.is_meta:  # where its cost is counted
            seen[len(x)] = seen.get(len(x), 0) + 1
        return forward(self, x, *inputs)

    config = CONFIG.model_copy(
        update={"max_steps": 4, "log_every": 1, "checkpoint_every": 4, "lr_schedule": "constant"}
    )
    uncut = train(config, edt, dataset, LocalContext(tmp_path / "uncut"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(whole[1].model), "forward", counted)
        cut = train(config.model_copy(update={"micro_batch_size": most}), edt, dataset, LocalContext(tmp_path / "cut"))
    assert max(seen) <= 2 * most  # two passes
    assert sum(size * times for size, times in seen.items()) == 4 * 2 * 16
    for row, expected in zip(cut.history.rows, uncut.history.rows, strict=True):
        assert row.keys() == expected.keys()
        assert all(row[name] == pytest.approx(expected[name], rel=1e-5) for name in row)


@pytest.mark.parametrize("most", suite_of([15, 3], [15, 8, 3, 1]))
def test_gradients_of_any_cut_are_those_of_the_whole(
    most: int, whole: tuple[Path, loop.TrainState], edt: ModelConfig, dataset: LatentDataset
) -> None:
    state = initial_state(CONFIG, edt)
    config = CONFIG.model_copy(update={"checkpoint_every": 1})
    restore(state, load_checkpoint(place(whole[0], 5)), config, len(dataset))
    batch = next(latent_batches(dataset, BatchPlan(0, 16, 0.5), 5))
    draws = draw_step(config, 5, edt)
    timesteps, _ = state.timesteps.draw(draws.uniforms.numpy())
    inputs = StepInputs(
        sampled_latents(batch, draws.posterior_noise, dataset.scale),
        batch.labels,
        torch.from_numpy(timesteps),
        torch.rand(16) + 0.5,
        draws,
    )
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for size in (None, most):
        state.model.zero_grad()
        cut = config.model_copy(update={"micro_batch_size": size})
        losses = accumulate_gradient(state.model, cut, linear_schedule(1000), inputs, edt.num_classes)
        gradient = torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None])
        found.append((losses, gradient.clone()))
    (losses, gradient), (cut_losses, cut_gradient) = found
    assert losses.shape == (4, 16)  # mse of two passes, then vb
    assert torch.allclose(cut_losses, losses, rtol=1e-5)  # in the order of the samples
    assert float((cut_gradient - gradient).norm()) <= 1e-5 * float(gradient.norm())


# --- several processes


@dataclass
class _Observed(CheckpointStore):
    """A store that keeps which steps were given to it."""

    saved: list[int] = field(default_factory=list)

    def save(self, checkpoint: Checkpoint) -> None:
        self.saved.append(checkpoint.step)
        super().save(checkpoint)


@dataclass
class _Worker:
    """One process of the tests below; `rank` 0 works alone where only one is wanted."""

    rank: int
    folder: Path
    dataset: LatentDataset
    samples: dict[int, list[int]] = field(default_factory=dict)

    def note(self, batch: LatentBatch) -> None:
        require_finite(batch)
        self.samples[batch.step] = batch.indices.tolist()

    def train(
        self, name: str, ranks: Ranks, config: TrainConfig, stop: int | None = None, *, mine: bool = True
    ) -> None:
        """One training; `stop` is a step to stop after, wished for here if it is `mine` to wish."""
        asked: list[None] = []

        def wish() -> Request:
            asked.append(None)
            return Request.STOP if len(asked) + first == stop else Request.NOTHING

        context = LocalContext(self.folder / name, ranks, request=wish if stop and mine else None)
        context.store = store = _Observed(context.store.out, context.num_to_keep, context.warn)
        first = (context.store.newest() or 0) if ranks.rank == 0 else 0
        self.samples.clear()
        stopped = weights = ""
        try:
            holdout = some_held_out() if config.holdout_share else None
            weights = digest(train(config, narrow(), self.dataset, context, holdout=holdout).model)
        except Stopped as error:
            stopped = str(error)
        recorded = {
            "samples": self.samples,
            "saved": store.saved,
            "reported": [row["step"] for row in context.reported],
            "previews": context.previews,
            "stopped": stopped,
            "weights": weights,
        }
        number = len(list(self.folder.glob(f"{name}.{ranks.rank}.*.json")))
        (self.folder / f"{name}.{ranks.rank}.{number}.json").write_text(json.dumps(recorded))


def digest(model: torch.nn.Module) -> str:
    """Of all weights, as they are on this rank."""
    values = [value.numpy().tobytes() for value in model.state_dict().values()]
    return hashlib.sha256(b"".join(values)).hexdigest()


def _work(rank: int, port: int, folder: Path, paths: list[Path]) -> None:
    """All trainings of one of three processes, of which the third waits while two work."""
    torch.set_num_threads(1)
    loop.matmul_rate = lambda *_: 1e9  # type: ignore[assignment]
    worker = _Worker(rank, folder, LatentDataset(paths))
    loop.require_finite = worker.note  # type: ignore[assignment]
    patience = timedelta(seconds=600)
    store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0, timeout=patience)
    alone = Ranks()
    if rank < 2:
        two = dist.PrefixStore("two", store)
        dist.init_process_group("gloo", store=two, rank=rank, world_size=2, timeout=patience)
        pair = Ranks(rank, 2)
        worker.train("two", pair, ELASTIC)
        if rank == 0:
            worker.train("one", alone, ELASTIC)
            cut_back(folder / "two", folder / "mixed", 4)
            worker.train("mixed", alone, ELASTIC, stop=6)
        dist.barrier()
        worker.train("mixed", pair, ELASTIC)
        worker.train("stopped", pair, ELASTIC, stop=6, mine=rank == 0)
        worker.train("stopped", pair, ELASTIC)
        rounded = ELASTIC.model_copy(update={"gradient_dtype": "bf16"})
        worker.train("rounded", pair, rounded)
        if rank == 0:
            worker.train("rounded alone", alone, rounded)
            cut_back(folder / "rounded", folder / "rounded on", 4)
        dist.barrier()
        worker.train("rounded on", pair, rounded)
        late = ELASTIC.model_copy(update={"timestep_sampler": "uniform", "log_every": 5})
        worker.train("late", pair, late)
        if rank == 0:
            worker.train("late alone", alone, late)
        held_out = ELASTIC.model_copy(update={"holdout": 0.2, "validate_every": 2, "log_every": 3})
        worker.train("held out", pair, held_out, stop=6, mine=rank == 1)  # rank 0's wish counts
        if rank == 0:
            worker.train("held out alone", alone, held_out)
        dist.destroy_process_group()
    three = dist.PrefixStore("three", store)
    dist.init_process_group("gloo", store=three, rank=rank, world_size=3, timeout=patience)
    uneven = ELASTIC.model_copy(update={"num_workers": (1, 3)})
    worker.train("three", Ranks(rank, 3), uneven)
    if rank == 0:
        cut_back(folder / "three", folder / "resumed", 4)
    dist.barrier()
    worker.train("resumed", Ranks(rank, 3), uneven)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(forks: None, latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which three processes have done their trainings."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks("tests.edt_core.test_training_exactness", 3, folder, *map(str, latents_artifact.paths("*.arrow")))
    return folder


def recorded(folder: Path, name: str, rank: int, number: int = 0) -> dict:
    return json.loads((folder / f"{name}.{rank}.{number}.json").read_text())


def final(folder: Path, name: str) -> Checkpoint:
    return load_checkpoint(place(folder / name, LAST))


def losses(checkpoint: Checkpoint) -> np.ndarray:
    return np.array([row["loss"] for row in checkpoint.state["history"]["rows"]])


@pytest.mark.extern
def test_two_processes_train_what_one_does_bit_for_bit(processes: Path) -> None:
    for step in (4, 8):
        assert contents(place(processes / "two", step)) == contents(place(processes / "one", step))
    assert len(losses(final(processes, "two"))) == LAST


@pytest.mark.extern
def test_two_processes_measure_the_held_out_loss_bit_for_bit(processes: Path) -> None:
    """20 images are three units: one process has one of them, the other two."""
    for step in (4, 8):
        assert contents(place(processes / "held out", step)) == contents(place(processes / "held out alone", step))
    rows = final(processes, "held out").state["history"]["rows"]
    assert [row["step"] for row in rows if "holdout_loss" in row] == [2, 4, 6, 8]
    assert recorded(processes, "held out", 1)["reported"] == []


@pytest.mark.extern
def test_another_number_of_workers_goes_on_bit_for_bit(processes: Path) -> None:
    """Two workers, then one from step 4, then two from step 6."""
    assert "step 6 of 8" in recorded(processes, "mixed", 0, 0)["stopped"]
    assert recorded(processes, "mixed", 0, 1)["reported"][:1] == [7]
    assert contents(place(processes / "mixed", LAST)) == contents(place(processes / "two", LAST))


@pytest.mark.extern
def test_every_global_batch_holds_the_same_samples_in_the_same_order(processes: Path) -> None:
    expected = {str(step): batch_indices(0, step, 16, 96).tolist() for step in range(LAST)}
    assert recorded(processes, "one", 0)["samples"] == expected
    for name, world_size in (("two", 2), ("three", 3)):
        ranks = [recorded(processes, name, rank)["samples"] for rank in range(world_size)]
        joined = {step: [row for rank in ranks for row in rank[step]] for step in expected}
        assert joined == expected
        assert {len(rank[step]) for rank in ranks for step in rank} == ({8} if world_size == 2 else {5, 6})
    alone, first, second = (recorded(processes, "mixed", *which)["samples"] for which in ((0, 0), (0, 1), (1, 0)))
    assert {step: alone[str(step)] for step in (4, 5)} == {step: expected[str(step)] for step in (4, 5)}
    assert {step: first[step] + second[step] for step in first} == {str(k): expected[str(k)] for k in (6, 7)}


@pytest.mark.extern
def test_uneven_shares_train_the_same(processes: Path) -> None:
    """Three workers have 5, 5 and 6 of the 16 samples."""
    one, three = losses(final(processes, "one")), losses(final(processes, "three"))
    assert one[0] != one[-1]
    assert np.abs(three / one - 1).max() < 1e-6


@pytest.mark.extern
def test_three_processes_resume_bit_for_bit(processes: Path) -> None:
    """From three on, the order of a sum hangs on where DDP puts a gradient."""
    assert contents(place(processes / "resumed", LAST)) == contents(place(processes / "three", LAST))


@pytest.mark.extern
def test_rank_0_alone_tells_and_saves(processes: Path) -> None:
    for name, world_size in (("two", 2), ("three", 3)):
        first = recorded(processes, name, 0)
        assert first["reported"] == list(range(1, LAST + 1))
        assert first["saved"] == [4, 8]
        assert first["previews"] == [4, 8]
        for rank in range(1, world_size):
            others = recorded(processes, name, rank)
            assert (others["reported"], others["saved"], others["previews"]) == ([], [], [])


@pytest.mark.extern
def test_all_ranks_stop_where_rank_0_wishes_it(processes: Path) -> None:
    assert all("step 6 of 8" in recorded(processes, "stopped", rank, 0)["stopped"] for rank in (0, 1))
    assert recorded(processes, "stopped", 0, 0)["saved"] == [4, 6]
    assert contents(place(processes / "stopped", LAST)) == contents(place(processes / "two", LAST))
    assert not any(recorded(processes, "held out", rank)["stopped"] for rank in (0, 1))


@pytest.mark.extern
def test_ranks_that_exchange_rounded_gradients_have_the_same_weights(processes: Path) -> None:
    both = [recorded(processes, "rounded", rank)["weights"] for rank in (0, 1)]
    assert both[0] == both[1] != recorded(processes, "two", 0)["weights"]
    exact, rounded = losses(final(processes, "two")), losses(final(processes, "rounded"))
    assert rounded[0] == exact[0]  # before the first update
    assert np.abs(rounded / exact - 1).max() < 0.05
    assert contents(place(processes / "rounded on", LAST)) == contents(place(processes / "rounded", LAST))


@pytest.mark.extern
def test_one_worker_exchanges_nothing_and_rounds_nothing(processes: Path) -> None:
    assert recorded(processes, "rounded alone", 0)["weights"] == recorded(processes, "one", 0)["weights"]


@pytest.mark.extern
def test_a_late_check_trains_the_same_on_two_processes(processes: Path) -> None:
    for step in (4, 8):
        assert contents(place(processes / "late", step)) == contents(place(processes / "late alone", step))
    assert recorded(processes, "late", 0)["weights"] == recorded(processes, "late", 1)["weights"]


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[3]), Path(sys.argv[4]), [Path(path) for path in sys.argv[5:]])
