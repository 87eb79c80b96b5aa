"""The training loop without Ray: every option trains, ends where it was told, and says what it does."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset, LatentShard, write_latent_tar
from edt_core.data.scale import LatentScale
from edt_core.data.streaming.tars import TarShard, TarStream
from edt_core.errors import Stopped, UserError
from edt_core.models import EDT, ModelConfig, mask_sites, model_config
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder, sha256_file
from edt_core.training.checkpoint import ema_model, load_checkpoint
from edt_core.training.context import LocalContext, Request
from edt_core.training.loop import train
from edt_core.training.optim import learning_rate
from edt_core.training.state import TrainState, initial_model
from tests.support.cases import suite_of
from tests.support.trainings import contents, cut_back, place, same, with_version

pytestmark = pytest.mark.usefixtures("quickly", "one_thread", "no_thread_stays")

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=16,
    max_steps=12,
    lr=2e-3,
    ema_decay=0.9,
    log_every=3,
    checkpoint_every=4,
)
SHORT = CONFIG.model_copy(update={"global_batch_size": 8, "max_steps": 6, "checkpoint_every": 3, "log_every": 4})


@pytest.fixture(scope="module")
def edt() -> ModelConfig:
    return model_config("EDT-Tiny/2", 32, 4)


@pytest.fixture(scope="module")
def speck(edt: ModelConfig) -> ModelConfig:
    """All that an EDT has, as narrow as can be."""
    return replace(edt, dims=(16, 20, 24, 20, 16), depths=(1, 1, 1, 1, 1))


@pytest.fixture(scope="module")
def stream(latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> TarStream:
    """The same latents as tars."""
    folder, shards = tmp_path_factory.mktemp("tars"), []
    for path in latents_artifact.paths("*.arrow"):
        rows = write_latent_tar(folder / f"{path.stem}.tar", LatentShard(path))
        shards.append(TarShard(Folder.at(folder), f"{path.stem}.tar", rows, sha256_file(folder / f"{path.stem}.tar")))
    return TarStream(tuple(shards), (4, 8, 8), LatentScale(0.5), shuffle_buffer=64)


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def with_options(options: dict[str, object], base: TrainConfig = SHORT) -> TrainConfig:
    return TrainConfig.model_validate({**base.model_dump(), **options})


class Whole(NamedTuple):
    """An uninterrupted training with the options of SHORT alone. Who changes what is in the folder takes a copy."""

    folder: Path
    state: TrainState
    context: LocalContext

    def copy(self, to: Path) -> dict[int, dict[str, bytes]]:
        """The contents of the copy's checkpoints by step."""
        shutil.copytree(self.folder, to)
        return {step: contents(place(to, step)) for step in steps_on_disk(to)}


@pytest.fixture(scope="module")
def whole(speck: ModelConfig, dataset: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole") / "run"
    context = LocalContext(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)
        return Whole(folder, train(SHORT, speck, dataset, context), context)


# --- options


OPTIONS: list[dict[str, object]] = [
    {"optimizer": "adamw", "weight_decay": 0.01},
    {"timestep_sampler": "uniform"},
    {"masked_loss": False},
    {"lr_schedule": "cosine"},
    {"lr_schedule": "constant"},
    {"warmup_steps": 4},
    {"max_grad_norm": 0.1},
    {"ema_decay": (0.9, 0.5, 0.99)},
    {"precision": "bf16"},
    {"precision": "tf32"},
    {"micro_batch_size": 3},
    {"mirror_prob": 0.0, "class_dropout_prob": 0.0},
    {"max_epochs": 0.4},
    {"max_hours": 100.0},
    {"num_timesteps": 21},
]
# The same options in four trainings. What a resumed training would miss of one, it misses beside others as well.
TOGETHER: list[dict[str, object]] = [
    {**OPTIONS[0], "lr_schedule": "cosine", "warmup_steps": 4, "max_grad_norm": 0.1, "precision": "bf16"},
    {**OPTIONS[7], **OPTIONS[11], "timestep_sampler": "uniform", "masked_loss": False, "micro_batch_size": 3},
    {"lr_schedule": "constant", "precision": "tf32", "max_epochs": 0.4, "num_timesteps": 21},
    {"max_hours": 100.0},
]


@pytest.mark.parametrize(
    "options",
    suite_of(TOGETHER, [*TOGETHER, *(each for each in OPTIONS if each not in TOGETHER)]),
    ids=str,
)
def test_every_option_trains_and_resumes(
    options: dict[str, object], speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    config = with_options(options)
    whole = train(config, speck, dataset, LocalContext(tmp_path / "a"))
    resumed = train(config, speck, dataset, cut_back(tmp_path / "a", tmp_path / "b", 3))
    last = whole.step
    assert last == (5 if "max_epochs" in options else 6)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert whole.history == resumed.history
    assert not same(whole.model.state_dict(), initial_model(speck, config.seed).state_dict())
    if "max_hours" not in options:  # the time that it took is in those
        assert contents(place(tmp_path / "a", last)) == contents(place(tmp_path / "b", last))


@pytest.fixture(scope="module")
def brief(speck: ModelConfig, dataset: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    """Three steps of SHORT."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)
        return train(with_options({"max_steps": 3}), speck, dataset, LocalContext(tmp_path_factory.mktemp("brief")))


@pytest.mark.parametrize("options", OPTIONS[:10], ids=str)
def test_every_option_makes_a_difference(
    options: dict[str, object], brief: TrainState, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    """tf32 alone makes none: it is of GPUs."""
    plain, other = brief, train(with_options({**options, "max_steps": 3}), speck, dataset, LocalContext(tmp_path))
    if "ema_decay" in options:
        assert len(other.ema.averages) == 3
        assert same(plain.ema.averages[0], other.ema.averages[0])
        assert not same(other.ema.averages[0], other.ema.averages[1])
    elif "timestep_sampler" in options:  # uniform too until each timestep was seen ten times
        assert other.timesteps.state_dict() == {}
    else:
        assert same(plain.model.state_dict(), other.model.state_dict()) == (options == {"precision": "tf32"})


def test_without_the_masked_loss_there_is_one_pass(
    speck: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = EDT.forward

    def counted(self: EDT, x: torch.Tensor, *inputs: object) -> torch.Tensor:
        if not x.is_meta:  # where its cost is counted
            seen.append(len(x))
        return forward(self, x, *inputs)

    monkeypatch.setattr(EDT, "forward", counted)
    for masked, samples in ((True, 16), (False, 8)):
        seen.clear()
        state = train(with_options({"masked_loss": masked, "max_steps": 2}), speck, dataset, LocalContext(tmp_path))
        assert seen == [samples] * 2
        assert ("loss_masked" in state.history.rows[-1]) == masked
        shutil.rmtree(tmp_path)


def test_activation_checkpointing_changes_no_bit(
    whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    less = train(with_options({"activation_checkpointing": True}), speck, dataset, LocalContext(tmp_path))
    assert same(whole.state.model.state_dict(), less.model.state_dict())
    assert contents(place(whole.folder, 6)) == contents(place(tmp_path, 6))


@pytest.mark.slow
def test_a_compiled_training_is_the_same_training(speck: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    """But for the last bits. Its checkpoints are those of the model that is not compiled."""
    plain = train(SHORT, speck, dataset, LocalContext(tmp_path / "a"))
    compiled = train(with_options({"compile": True}), speck, dataset, LocalContext(tmp_path / "b"))
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    for row, other in zip(plain.history.rows, compiled.history.rows, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
    resumed = train(SHORT, speck, dataset, cut_back(tmp_path / "b", tmp_path / "c", 3))
    assert resumed.step == 6


def test_xl_s_third_masking_site_trains(speck: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    """The masks of a model with a site inside its first stage go through the fused pass."""
    tiny = model_config("EDT-Tiny/2", 32, 4)
    edt = replace(tiny, mid_mask_block=1)
    assert len(mask_sites(edt)) == 3
    assert train(with_options({"max_steps": 2}), edt, dataset, LocalContext(tmp_path)).step == 2


# --- learning


def test_the_loss_falls(speck: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    config = with_options({"max_steps": 60, "checkpoint_every": 60, "lr": 5e-3}, CONFIG)
    losses = [row["loss_full"] for row in train(config, speck, dataset, LocalContext(tmp_path)).history.rows]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_the_ema_is_what_is_sampled_from(whole: Whole, speck: ModelConfig) -> None:
    state = whole.state
    model = ema_model(place(whole.folder, 6))
    assert not model.training
    assert model.config == speck
    assert same(model.state_dict(), state.ema.averages[0])
    assert not same(model.state_dict(), state.model.state_dict())


def test_each_checkpoint_holds_every_average_s_recursion(
    speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    config = with_options({"max_steps": 3, "checkpoint_every": 1, "ema_decay": (0.9, 0.5)})
    train(config, speck, dataset, LocalContext(tmp_path))
    name = "blocks.0.mlp.fc1.weight"
    for decay, file in ((0.9, "ema.safetensors"), (0.5, "ema-0.5.safetensors")):
        expected = initial_model(speck, 0).state_dict()[name]
        for step in (1, 2, 3):
            tensors = load_checkpoint(place(tmp_path, step)).tensors
            expected = decay * expected + (1 - decay) * tensors["model.safetensors"][name]
            assert torch.allclose(tensors[file][name], expected, rtol=1e-5, atol=1e-7)


def test_max_steps_zero_is_the_untrained_model(speck: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    state = train(with_options({"max_steps": 0}), speck, dataset, LocalContext(tmp_path))
    assert state.step == 0
    assert same(state.ema.averages[0], initial_model(speck, 0).state_dict())
    assert not same(state.ema.averages[0], initial_model(speck, 1).state_dict())


def test_a_streamed_training_learns_and_goes_on(speck: ModelConfig, stream: TarStream, tmp_path: Path) -> None:
    options = {"reader": "webdataset", "max_steps": 60, "checkpoint_every": 50, "masked_loss": False, "lr": 5e-3}
    config = with_options(options, CONFIG)
    whole = train(config, speck, stream, LocalContext(tmp_path / "a"))
    losses = [row["loss"] for row in whole.history.rows]
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])
    resumed = train(config, speck, stream, cut_back(tmp_path / "a", tmp_path / "b", 50))
    assert resumed.step == 60
    assert [row["step"] for row in resumed.history.rows] == [row["step"] for row in whole.history.rows]
    assert resumed.history.rows[:16] == whole.history.rows[:16]  # up to step 48


def test_a_streamed_training_resumed_at_an_epoch_s_start_sees_each_sample_once(
    speck: ModelConfig, stream: TarStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 samples, six batches of 16 an epoch; resumed at step 6."""
    seen: dict[int, tuple[str, ...]] = {}

    def noted(batch: object) -> None:
        seen[batch.step] = batch.keys  # type: ignore[attr-defined]

    monkeypatch.setattr("edt_core.training.loop.require_finite", noted)
    config = with_options({"reader": "webdataset", "checkpoint_every": 6}, CONFIG)
    train(config, speck, stream, LocalContext(tmp_path / "a"))
    train(config, speck, stream, cut_back(tmp_path / "a", tmp_path / "b", 6))
    for epoch in (range(6), range(6, 12)):
        keys = [key for step in epoch for key in seen[step]]
        assert len(keys) == len(set(keys)) == 96


# --- another configuration


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 1e-3), ("seed", 1), ("global_batch_size", 16), ("ema_decay", (0.9, 0.5)), ("max_steps", 7)],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    name: str, value: object, whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    before = whole.copy(folder)
    with pytest.raises(UserError, match=f"training with {name} .* instead of") as caught:
        train(with_options({name: value}), speck, dataset, LocalContext(folder))
    others = set(TrainConfig.model_fields) - {name}
    assert not [other for other in others if f"{other} " in str(caught.value).split("resuming")[0]]
    assert {step: contents(place(folder, step)) for step in steps_on_disk(folder)} == before


def test_a_checkpoint_of_other_draws_is_refused_and_kept(
    whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    whole.copy(folder)
    newest = with_version(place(folder, max(steps_on_disk(folder))), 2)
    before = {step: contents(place(folder, step)) for step in steps_on_disk(folder)}
    with pytest.raises(UserError, match=f"cannot be resumed.*train.init_from={newest}"):
        train(SHORT, speck, dataset, LocalContext(folder))
    assert {step: contents(place(folder, step)) for step in steps_on_disk(folder)} == before


def test_how_it_runs_may_change_between_two_runs(
    whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    runtime = {"checkpoint_every": 5, "num_to_keep": 1, "preview_every": 2, "max_failures": 0, "num_workers": (1, 4)}
    state = train(with_options(runtime), speck, dataset, cut_back(whole.folder, tmp_path / "b", 3))
    assert state.step == 6


def test_a_checkpoint_of_other_data_is_refused(
    whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    whole.copy(tmp_path / "copy")

    class Longer(LatentDataset):
        def __len__(self) -> int:
            return 95

    longer = Longer.__new__(Longer)
    longer.__dict__.update(dataset.__dict__)
    with pytest.raises(UserError, match="number of latents 96 instead of 95"):
        train(SHORT, speck, longer, LocalContext(tmp_path / "copy"))


# --- ends


def after(steps: int, request: Request) -> Callable[[], Request]:
    """A wish that comes once, when it is asked for the `steps`-th time."""
    asked: list[None] = []

    def wish() -> Request:
        asked.append(None)
        return request if len(asked) == steps else Request.NOTHING

    return wish


@pytest.mark.parametrize("stop", suite_of([3, 5], [1, 3, 5]))  # 3 is a checkpoint's turn anyway
def test_a_stopped_training_goes_on_as_if_it_had_not_been(
    stop: int, whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match=f"step {stop} of 6"):
        train(SHORT, speck, dataset, LocalContext(tmp_path / "cut", request=after(stop, Request.STOP)))
    context = LocalContext(tmp_path / "cut")
    assert context.store.newest() == stop
    assert context.store.manifests()[stop].regular == (stop == 3)
    train(SHORT, speck, dataset, context)
    assert contents(place(tmp_path / "cut", 6)) == contents(place(whole.folder, 6))
    assert steps_on_disk(tmp_path / "cut") == [3, 6]
    assert context.warnings == []


def test_a_wish_that_comes_with_the_last_step_changes_nothing(
    speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    state = train(SHORT, speck, dataset, LocalContext(tmp_path, request=after(6, Request.STOP)))
    assert state.step == 6
    assert steps_on_disk(tmp_path) == [3, 6]


def test_a_training_can_be_stopped_at_every_step(
    whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    for stop in range(1, 6):
        with pytest.raises(Stopped, match=f"step {stop} of 6"):
            train(SHORT, speck, dataset, LocalContext(tmp_path / "cut", request=lambda: Request.STOP))
    train(SHORT, speck, dataset, LocalContext(tmp_path / "cut", request=lambda: Request.STOP))
    assert contents(place(tmp_path / "cut", 6)) == contents(place(whole.folder, 6))


@pytest.mark.parametrize("at", suite_of([4, 5], [1, 4, 5]))
def test_a_checkpoint_out_of_turn_is_kept_only_while_it_is_the_newest(
    at: int, whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    kept: dict[int, list[int]] = {}
    wish = after(at, Request.SAVE)
    context = LocalContext(tmp_path / "saved")

    def noted() -> Request:
        kept[len(kept) + 1] = context.store.steps()
        return wish()

    context.request = noted
    assert train(SHORT, speck, dataset, context).step == 6
    if at < 5:
        assert at in kept[at + 1]
    assert context.store.prune(at_end=True) == [3, 6] == steps_on_disk(tmp_path / "saved")
    for step in (3, 6):
        assert contents(place(tmp_path / "saved", step)) == contents(place(whole.folder, step))


def test_one_out_of_turn_at_the_end_is_not_among_the_final_ones(
    speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        train(SHORT, speck, dataset, LocalContext(tmp_path, request=after(5, Request.STOP)))
    context = LocalContext(tmp_path)
    assert context.store.steps() == [3, 5]
    assert context.store.prune(at_end=True) == [3]


def test_a_wish_of_nothing_writes_nothing(speck: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    train(SHORT, speck, dataset, LocalContext(tmp_path, request=lambda: Request.NOTHING))
    assert steps_on_disk(tmp_path) == [3, 6]


@pytest.mark.parametrize(("epochs", "steps"), suite_of([(0.3, 4)], [(0.25, 3), (0.3, 4), (1000.0, 6)]))
def test_it_ends_after_max_epochs(
    epochs: float, steps: int, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    """96 samples: 12 steps an epoch."""
    config = with_options({"max_epochs": epochs})
    context = LocalContext(tmp_path)
    state = train(config, speck, dataset, context)
    assert state.step == steps
    assert steps_on_disk(tmp_path)[-1] == steps
    assert context.store.manifests()[steps].regular
    assert context.reported[-1]["step"] == steps
    assert context.reported[-1]["lr"] == learning_rate(config, steps - 1, steps)  # the fall is laid out for them


def test_it_ends_when_its_time_is_up(speck: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    """With the step that begins when the time is up; the fall of the rate stays that of all steps."""
    config = with_options({"max_hours": 1e-9})
    context = LocalContext(tmp_path)
    state = train(config, speck, dataset, context)
    assert 1 <= state.step <= 2
    assert steps_on_disk(tmp_path) == [state.step]
    assert context.store.manifests()[state.step].regular
    assert context.reported[-1]["lr"] == learning_rate(config, state.step - 1, 6)
    before = contents(place(tmp_path, state.step))
    again = LocalContext(tmp_path)
    assert train(config, speck, dataset, again).step == state.step
    assert again.reported == []
    assert contents(place(tmp_path, state.step)) == before


def test_time_counts_over_restarts(speck: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    config = with_options({"max_hours": 1.0})
    with pytest.raises(Stopped):
        train(config, speck, dataset, LocalContext(tmp_path, request=after(3, Request.STOP)))
    first = load_checkpoint(place(tmp_path, 3)).state["seconds"]
    state = train(config, speck, dataset, LocalContext(tmp_path))
    assert 0 < first < state.seconds < 3600


def test_a_training_that_is_done_does_nothing(
    whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    before = whole.copy(tmp_path / "copy")
    context = LocalContext(tmp_path / "copy")
    again = train(SHORT, speck, dataset, context)
    assert same(whole.state.model.state_dict(), again.model.state_dict())
    assert whole.state.history == again.history
    assert (context.reported, context.previews, context.warnings) == ([], [], [])
    assert contents(place(tmp_path / "copy", 6)) == before[6]


def test_without_previews_there_are_none(whole: Whole) -> None:
    assert whole.context.previews == []


PREVIEWS: list[tuple[int, list[int]]] = [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (9, [6])]


@pytest.mark.parametrize(
    ("every", "steps"),
    suite_of(PREVIEWS[1:3], PREVIEWS),
)
def test_previews_come_in_their_turn_and_at_the_end(
    every: int, steps: list[int], speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    context = LocalContext(tmp_path)
    train(with_options({"preview_every": every}), speck, dataset, context)
    assert context.previews == steps


def test_a_preview_is_of_the_first_average(speck: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    shown: list[dict[str, torch.Tensor]] = []

    class Watching(LocalContext):
        def preview(self, weights: object, step: int) -> None:
            shown.append({name: value.clone() for name, value in weights.items()})  # type: ignore[attr-defined]

    config = with_options({"preview_every": 3, "ema_decay": (0.9, 0.5)})
    train(config, speck, dataset, Watching(tmp_path))
    for weights, step in zip(shown, (3, 6), strict=True):
        assert same(weights, dict(load_checkpoint(place(tmp_path, step)).tensors["ema.safetensors"]))


# --- figures


FIGURES = {
    "images_per_s",
    "data_wait_share",
    "step_time_p50_s",
    "step_time_p95_s",
    "mfu_measured",
    "device_memory_mib",
}
LOSSES = {"loss", "loss_full", "mse", "vb", "grad_norm"}


@pytest.mark.parametrize("masked", [True, False])
def test_every_row_that_is_reported_has_the_figures(
    masked: bool, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    config = with_options({"masked_loss": masked, "log_every": 2, "max_steps": 5, "warmup_steps": 2})
    context = LocalContext(tmp_path)
    state = train(config, speck, dataset, context)
    assert [row["step"] for row in context.reported] == [2, 4, 5]
    for row in context.reported:
        quartiles = {f"loss_t{number}" for number in range(4)}
        assert row.keys() - quartiles == {"step", "lr"} | FIGURES | LOSSES | ({"loss_masked"} if masked else set())
        assert row.keys() & quartiles
        assert row["lr"] == learning_rate(config, int(row["step"]) - 1, 5)
        assert row["loss"] == pytest.approx(row["loss_full"] + row.get("loss_masked", 0.0), rel=1e-9)
        assert row["mse"] + row["vb"] == pytest.approx(row["loss_full"], rel=1e-9)
        assert row["grad_norm"] > 0
        assert row["images_per_s"] > 0
        assert 0 <= row["data_wait_share"] <= 1
        assert 0 < row["step_time_p50_s"] <= row["step_time_p95_s"]
        assert row["mfu_measured"] > 0
        assert row["device_memory_mib"] > 0
        assert all(np.isfinite(value) for value in row.values())
    kept = [{name: value for name, value in row.items() if name not in FIGURES} for row in context.reported]
    assert kept == state.history.rows


def test_a_row_is_the_mean_of_its_steps(
    whole: Whole, speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    each = train(with_options({"log_every": 1}), speck, dataset, LocalContext(tmp_path)).history.rows
    for row, steps in zip(whole.state.history.rows, (each[:4], each[4:]), strict=True):
        for name in LOSSES:
            assert row[name] == pytest.approx(np.mean([step[name] for step in steps]), rel=1e-12)


def test_a_checkpoint_s_score_is_the_mean_loss_since_the_one_before(
    speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    """Also where one out of turn lies between."""
    config = with_options({"log_every": 1})
    context = LocalContext(tmp_path, request=after(4, Request.SAVE))
    losses = [row["loss"] for row in train(config, speck, dataset, context).history.rows]
    found = context.store.manifests()
    assert found[3].score == pytest.approx(np.mean(losses[:3]), rel=1e-12)
    assert found[6].score == pytest.approx(np.mean(losses[3:]), rel=1e-12)


def test_kept_are_the_newest_and_the_best(speck: ModelConfig, dataset: LatentDataset, tmp_path: Path) -> None:
    config = with_options({"checkpoint_every": 1, "log_every": 1})
    context = LocalContext(tmp_path, num_to_keep=2)
    state: TrainState = train(config, speck, dataset, context)
    losses = [row["loss"] for row in state.history.rows]
    best = int(np.argmin(losses)) + 1
    assert context.store.prune(at_end=True) == sorted({best, 5, 6})
    assert steps_on_disk(tmp_path) == sorted({best, 5, 6})


def test_the_clip_is_of_what_the_optimizer_sees_and_the_norm_told_is_before_it(
    speck: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def noted(self: torch.optim.Optimizer, closure: None = None) -> None:
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(torch.cat(grads).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    config = with_options({"optimizer": "adamw", "max_grad_norm": 0.05, "log_every": 1})
    state = train(config, speck, dataset, LocalContext(tmp_path))
    assert seen == pytest.approx([min(0.05, row["grad_norm"]) for row in state.history.rows], rel=1e-4)
    assert max(row["grad_norm"] for row in state.history.rows) > 0.05


def test_a_stop_in_the_last_moment_of_the_time_leaves_something_to_keep(
    speck: ModelConfig, dataset: LatentDataset, tmp_path: Path
) -> None:
    """The time is up with the very step after which somebody stops it: its checkpoint is no regular one."""
    config = with_options({"max_hours": 1e-9})
    with pytest.raises(Stopped):
        train(config, speck, dataset, LocalContext(tmp_path, request=lambda: Request.STOP))
    context = LocalContext(tmp_path)
    state = train(config, speck, dataset, context)
    assert state.step == 2
    assert context.store.prune(at_end=True) == [2]
