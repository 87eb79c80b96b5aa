"""The held-out loss during a training: what it is, that it disturbs nothing, and that it is resumed exactly."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core.config import TrainConfig
from edt_core.data.holdout import Holdout
from edt_core.data.latents import LatentDataset
from edt_core.diffusion import linear_schedule
from edt_core.diffusion.timesteps import middle_timesteps
from edt_core.errors import UserError
from edt_core.training.checkpoint import load_checkpoint
from edt_core.training.context import LocalContext
from edt_core.training.loop import TrainState, train
from edt_core.training.ranks import Ranks
from edt_core.training.start.initial import initial_checkpoint
from edt_core.training.start.trainable import merged
from edt_core.training.state import initial_model, initial_state
from edt_core.training.store import best_step
from edt_core.training.validation.measure import TIMESTEPS, HeldOutLoss, validation_interval
from tests.edt_core.test_training_start import NAMES, base_of
from tests.support.cases import suite_of
from tests.support.holdouts import some_held_out
from tests.support.models import TINY, shallow_config
from tests.support.trainings import contents, cut_back, narrow, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=16,
    max_steps=8,
    lr=2e-3,
    ema_decay=(0.5, 0.9),
    log_every=3,
    checkpoint_every=1,
    holdout=0.2,
    validate_every=2,
)
BINS = [f"holdout_loss_t{k}" for k in range(8)]


@pytest.fixture(scope="module")
def holdout() -> Holdout:
    return some_held_out()


@pytest.fixture(scope="module")
def whole(
    dataset: LatentDataset, holdout: Holdout, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LocalContext, TrainState]:
    """A training of 8 steps, a checkpoint after each; rows at 3, 6 and 8, measurements at 2, 4, 6 and 8."""
    context = LocalContext(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)
        return context, train(CONFIG, narrow(), dataset, context, holdout=holdout)


# --- what is measured


def plain_loss(model: torch.nn.Module, measure: HeldOutLoss, objective: str) -> np.ndarray:
    """The loss [M, 8] written out: an image and a timestep at a time, with the noise of the measurement."""
    schedule, found = linear_schedule(1000), np.empty((measure.images, 8))
    noise = _noise_of(measure)
    model.eval()
    for row in range(measure.images):
        for k, t in enumerate(range(62, 1000, 125)):
            x, y, eps = measure._latents[row : row + 1], measure._labels[row : row + 1], noise[row, k].unsqueeze(0)
            signal = float(schedule.gather(torch.tensor([t]), 1).signal_scale)
            spread = (1 - signal**2) ** 0.5
            target = eps if objective == "epsilon" else signal * eps - spread * x
            time = torch.tensor([t])
            if objective == "flow":
                signal, spread, target = 1 - (k + 0.5) / 8, (k + 0.5) / 8, x - eps
                time = torch.tensor([signal])
            with torch.no_grad():
                output = model(signal * x + spread * eps, time, y)[:, : x.shape[1]]
            found[row, k] = float((output - target).square().mean())
    return found


def _noise_of(measure: HeldOutLoss) -> Tensor:
    from edt_core.training.validation.measure import _noise

    return _noise(measure._digests, middle_timesteps(TIMESTEPS, 1000), measure._latents.shape[1:])


# Each family and each objective: what is measured calls a model, and asks an objective, without looking at the other.
MEASURED = [
    ("EDT-Tiny/2", "epsilon"),
    ("MDTv2-Tiny/2", "epsilon"),
    ("DiT-Tiny/2", "v_prediction"),
    ("UViT-Tiny/2", "flow"),
]


@pytest.mark.parametrize(
    ("name", "objective"),
    suite_of(MEASURED, product(TINY, ("epsilon", "v_prediction", "flow"))),
)
def test_it_is_the_unweighted_error_with_labels_and_without_masks(
    name: str, objective: str, dataset: LatentDataset, holdout: Holdout
) -> None:
    from edt_core.diffusion import with_objective

    model_config = with_objective(shallow_config(name), objective)
    config = CONFIG.model_copy(update={"model": name, "objective": objective, "class_dropout_prob": 0.9})
    model = initial_model(model_config, 3)
    with torch.no_grad():
        for parameter in model.parameters():  # the last layer's initial weights are 0
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    measure = HeldOutLoss(config, model_config, dataset, holdout, Ranks())
    values = measure.measure(model.state_dict())
    expected = plain_loss(model, measure, objective)
    assert list(values) == ["holdout_loss", *BINS]
    assert [values[name] for name in BINS] == pytest.approx(expected.mean(0).tolist(), rel=1e-4)
    assert values["holdout_loss"] == pytest.approx(expected.mean(), rel=1e-4)


def test_the_timesteps_are_the_middles_of_eight_equal_parts() -> None:
    assert middle_timesteps(TIMESTEPS, 1000).tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert len(set(middle_timesteps(TIMESTEPS, 21).tolist())) == 8
    assert middle_timesteps(TIMESTEPS, 21).max() < 21


def test_an_image_is_measured_alike_in_any_company(dataset: LatentDataset, holdout: Holdout) -> None:
    """Latents and noise are functions of its digest: other images, another order and another seed change nothing."""
    one = HeldOutLoss(CONFIG, narrow(), dataset, holdout, Ranks())
    few = Holdout(holdout.rows[:9], holdout.measured[5:14][::-1], holdout.digests[5:14][::-1])
    other = HeldOutLoss(CONFIG.model_copy(update={"seed": 9}), narrow(), dataset, few, Ranks())
    assert torch.equal(other._latents[:9], one._latents[5:14].flip(0))
    assert torch.equal(_noise_of(other)[:9], _noise_of(one)[5:14].flip(0))
    flat = _noise_of(one)[:20].flatten(2)
    assert len({tuple(row[:4].tolist()) for row in flat.flatten(0, 1)}) == 160  # no noise twice
    assert float(flat.mean()) == pytest.approx(0, abs=0.02)
    assert float(flat.std()) == pytest.approx(1, abs=0.02)


@dataclass(frozen=True)
class _Apart(Ranks):
    """A rank whose part is returned as if there were no others."""

    def gather(self, values: Tensor, sizes: Any) -> Tensor:
        assert values.shape == (8, sizes[self.rank])
        object.__setattr__(self, "part", values)
        return torch.zeros(8, sum(sizes))


@pytest.mark.parametrize("world_size", suite_of([2, 5], [2, 3, 5]))
def test_the_bits_do_not_depend_on_the_number_of_ranks(
    world_size: int, dataset: LatentDataset, holdout: Holdout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 images are three units of 8, which five ranks cannot all have."""
    weights = initial_model(narrow(), 3).state_dict()
    kept: list[Tensor] = []
    monkeypatch.setattr(Ranks, "gather", lambda self, values, sizes: kept.append(values) or values)
    HeldOutLoss(CONFIG, narrow(), dataset, holdout, Ranks()).measure(weights)
    parts = []
    for rank in range(world_size):
        apart = _Apart(rank, world_size)
        HeldOutLoss(CONFIG, narrow(), dataset, holdout, apart).measure(weights)
        parts.append(apart.part)  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(parts, dim=1), kept[0])
    assert kept[0].shape == (8, 24)


def test_the_average_is_measured_and_not_the_weights(
    whole: tuple[LocalContext, TrainState], dataset: LatentDataset, holdout: Holdout
) -> None:
    state = whole[1]
    measure = HeldOutLoss(CONFIG, narrow(), dataset, holdout, Ranks())
    last = state.history.rows[-1]
    assert measure.measure(state.average()) == {name: last[name] for name in ("holdout_loss", *BINS)}
    assert measure.measure(state.model.state_dict())["holdout_loss"] != last["holdout_loss"]
    assert measure.measure(state.ema.averages[1])["holdout_loss"] != last["holdout_loss"]


def test_held_out_latents_that_are_not_finite_are_refused(dataset: LatentDataset, holdout: Holdout) -> None:
    class Spoiled(LatentDataset):
        def __init__(self) -> None:
            self.__dict__ |= dataset.__dict__

        def gather(self, indices: Any, mirror: Any, out: Any = None) -> Any:
            posterior, labels = super().gather(indices, mirror, out)
            posterior[indices == holdout.rows[3]] = np.nan
            return posterior, labels

    with pytest.raises(UserError, match=rf"^1 held-out latents are not finite \(rows {holdout.rows[3]}\); encode"):
        HeldOutLoss(CONFIG, narrow(), Spoiled(), holdout, Ranks())


# --- when


def test_by_default_it_takes_one_percent_of_the_time_in_whole_rows() -> None:
    config = TrainConfig(global_batch_size=256, log_every=50)
    assert validation_interval(config, 1024) == 550  # 8,192 passes; a step is 1,536
    assert validation_interval(config, 64) == 50
    assert validation_interval(config.model_copy(update={"masked_loss": False}), 1024) == 1100
    assert validation_interval(config.model_copy(update={"validate_every": 7}), 1024) == 7
    for measured in (64, 100, 500, 1024):
        every = validation_interval(config, measured)
        assert every % 50 == 0
        assert measured * 8 <= 0.01 * every * 256 * 2 * 3


def test_rows_of_the_history_have_it_at_their_step_and_it_is_reported(whole: tuple[LocalContext, TrainState]) -> None:
    context, state = whole
    rows = {row["step"]: row for row in state.history.rows}
    assert list(rows) == [2, 3, 4, 6, 8]
    assert [step for step, row in rows.items() if "holdout_loss" in row] == [2, 4, 6, 8]
    assert [step for step, row in rows.items() if "loss" in row] == [3, 6, 8]
    assert set(rows[2]) == {"step", "holdout_loss", *BINS}
    reported = [row for row in context.reported if "holdout_loss" in row]
    assert [(row["step"], row["holdout_loss"]) for row in reported] == [
        (step, rows[step]["holdout_loss"]) for step in (2, 4, 6, 8)
    ]
    for row in reported:
        assert row["holdout_loss"] == pytest.approx(np.mean([row[name] for name in BINS]))


def test_it_is_measured_at_the_end_too(dataset: LatentDataset, holdout: Holdout, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": 3, "validate_every": 100})
    rows = train(config, narrow(), dataset, LocalContext(tmp_path), holdout=holdout).history.rows
    assert [row["step"] for row in rows if "holdout_loss" in row] == [3]


# --- it disturbs nothing


@pytest.mark.parametrize("sampler", ["loss-second-moment", pytest.param("uniform", marks=pytest.mark.slow)])
def test_the_bits_of_the_training_are_those_without_it(
    sampler: str, dataset: LatentDataset, holdout: Holdout, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"timestep_sampler": sampler})
    torch.manual_seed(5)
    state = train(config, narrow(), dataset, LocalContext(tmp_path / "with"), holdout=holdout)
    torch.manual_seed(6)
    rows = dataset.part(holdout.training_rows(len(dataset)))
    without = train(config, narrow(), rows, LocalContext(tmp_path / "without"))
    assert same(state.model.state_dict(), without.model.state_dict())
    for average, expected in zip(state.ema.averages, without.ema.averages, strict=True):
        assert same(average, expected)
    losses = [{k: v for k, v in row.items() if "holdout" not in k} for row in state.history.rows if "loss" in row]
    assert losses == without.history.rows
    for name in ("model.safetensors", "optimizer.safetensors", "timesteps.safetensors"):
        files = [contents(place(tmp_path / folder, 8))[name] for folder in ("with", "without")]
        assert files[0] == files[1]


def test_it_draws_nothing_from_the_global_generator(dataset: LatentDataset, holdout: Holdout) -> None:
    measure = HeldOutLoss(CONFIG, narrow(), dataset, holdout, Ranks())
    weights, before = initial_model(narrow(), 3).state_dict(), torch.get_rng_state()
    values = {name: tensor.clone() for name, tensor in weights.items()}
    first = measure.measure(weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(weights, values)
    assert measure.measure(weights) == first


def test_held_out_rows_are_never_trained_on(
    dataset: LatentDataset, holdout: Holdout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("edt_core.training.loop.require_finite", lambda batch: seen.extend(batch.indices.tolist()))
    config = CONFIG.model_copy(update={"max_steps": 100, "max_epochs": 2.0, "global_batch_size": 19})
    state = train(config, narrow(), dataset, LocalContext(tmp_path), holdout=holdout)
    assert state.step == 8  # two epochs of the 76 rows that are left
    assert sorted(seen) == sorted([*holdout.training_rows(96), *holdout.training_rows(96)])
    cursor = load_checkpoint(place(tmp_path, 8)).state["cursor"]
    assert (cursor["num_samples"], cursor["epoch"], cursor["place"]) == (76, 2, 0)


# --- resumed, and the best


# Before and at a measurement; step 6 has a row of the loss as well.
@pytest.mark.parametrize("step", suite_of([5, 6], [1, 2, 3, 5, 6, 7]))
def test_a_resumed_training_has_the_same_history_and_checkpoints(
    step: int, whole: tuple[LocalContext, TrainState], dataset: LatentDataset, holdout: Holdout, tmp_path: Path
) -> None:
    context, state = whole
    copy = cut_back(context.folder, tmp_path / "copy", step)
    resumed = train(CONFIG, narrow(), dataset, copy, holdout=holdout)
    assert resumed.history == state.history
    assert same(resumed.model.state_dict(), state.model.state_dict())
    for later in range(step + 1, 9):
        assert contents(place(tmp_path / "copy", later)) == contents(place(context.folder, later))


def test_another_holdout_is_another_training(
    whole: tuple[LocalContext, TrainState], dataset: LatentDataset, tmp_path: Path
) -> None:
    copy = cut_back(whole[0].folder, tmp_path / "copy", 4)
    with pytest.raises(UserError, match=r"number of latents 76 instead of 96, holdout 0\.2 instead of at its default"):
        train(TrainConfig(**{**CONFIG.model_dump(), "holdout": 0}), narrow(), dataset, copy)


def test_the_best_checkpoint_has_the_lowest_held_out_loss(
    whole: tuple[LocalContext, TrainState], dataset: LatentDataset, holdout: Holdout
) -> None:
    """Also between two measurements of the history, of its own average."""
    manifests = whole[0].store.manifests()
    measure = HeldOutLoss(CONFIG, narrow(), dataset, holdout, Ranks())
    for step, manifest in manifests.items():
        average = load_checkpoint(place(whole[0].folder, step)).tensors["ema.safetensors"]
        assert manifest.score == measure.measure(average)["holdout_loss"]
    scores = {step: manifest.score for step, manifest in manifests.items()}
    assert best_step(manifests) == min(scores, key=lambda step: scores[step])
    assert len(set(scores.values())) == 8


def test_without_held_out_images_the_score_is_the_mean_loss(dataset: LatentDataset, tmp_path: Path) -> None:
    context = LocalContext(tmp_path)
    config = TrainConfig(**{**CONFIG.model_dump(), "holdout": 0, "max_steps": 3, "log_every": 1})
    state = train(config, narrow(), dataset, context)
    scores = [manifest.score for _, manifest in sorted(context.store.manifests().items())]
    assert scores == [row["loss"] for row in state.history.rows]


def test_a_loss_that_is_not_finite_is_left_out_with_a_warning(
    dataset: LatentDataset, holdout: Holdout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = HeldOutLoss.measure

    def spoiled(self: HeldOutLoss, weights: Any) -> dict[str, float]:
        values = measure(self, weights)
        return {**values, "holdout_loss": float("nan"), "holdout_loss_t7": float("inf")}

    monkeypatch.setattr(HeldOutLoss, "measure", spoiled)
    context = LocalContext(tmp_path)
    config = CONFIG.model_copy(update={"max_steps": 2, "checkpoint_every": 2})
    state = train(config, narrow(), dataset, context, holdout=holdout)
    assert context.warnings == ["the held-out loss of step 2 is not finite, and is left out of the history"]
    assert set(state.history.rows[-1]) & {"holdout_loss", *BINS} == set(BINS[:7])
    assert context.store.manifests()[2].score is None


# --- few trained parameters


def test_a_fine_tuning_measures_the_whole_model(dataset: LatentDataset, holdout: Holdout, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"trainable": "difffit", "lr": 1e-2})
    base = base_of(narrow(), seed=5, digest="d" * 64)
    context = LocalContext(tmp_path)
    state = train(
        config, narrow(), dataset, context, lambda: initial_checkpoint(config, narrow(), base, NAMES)[0], holdout
    )
    losses = [row["holdout_loss"] for row in state.history.rows if "holdout_loss" in row]
    assert len(set(losses)) == 4
    measure = HeldOutLoss(config, narrow(), dataset, holdout, Ranks())
    whole = merged({**state.model.state_dict(), **state.ema.averages[0]})
    assert measure.measure(whole)["holdout_loss"] == losses[-1]
    model = initial_state(config, narrow()).model  # with scales that are not merged
    model.load_state_dict({**state.model.state_dict(), **state.ema.averages[0]})
    assert losses[-1] == pytest.approx(plain_loss(model, measure, "epsilon").mean(), rel=1e-4)


def test_a_narrower_precision_is_that_of_the_training(dataset: LatentDataset, holdout: Holdout) -> None:
    weights = initial_model(narrow(), 3).state_dict()
    weights = {
        name: value + 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        if value.is_floating_point()
        else value
        for name, value in weights.items()
    }
    exact, rounded = (
        HeldOutLoss(CONFIG.model_copy(update={"precision": p}), narrow(), dataset, holdout, Ranks()).measure(weights)
        for p in ("fp32", "bf16")
    )
    assert exact != rounded
    assert rounded["holdout_loss"] == pytest.approx(exact["holdout_loss"], rel=0.02)
