"""Trainings with power-function averages: what else stays the same, their snapshots, and a training cut short."""

import json
from pathlib import Path

import pytest
import torch

from edt_core.config import TrainConfig, result_fields
from edt_core.data.latents import LatentDataset
from edt_core.errors import UserError
from edt_core.files.tensor_files import load_tensors, opened_tensors
from edt_core.store.artifact import JOURNAL, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.training.checkpoint import load_checkpoint
from edt_core.training.context import LocalContext
from edt_core.training.estimate import estimate, host_memory
from edt_core.training.loop import train
from edt_core.training.posthoc.profile import exponent, rate
from edt_core.training.posthoc.snapshots import Snapshot, snapshot_steps
from edt_core.training.start.siblings import _is_exact
from edt_core.training.start.trainable import merged, unmerged
from edt_core.training.state import TrainState, initial_state, restart
from edt_core.training.store import CheckpointStore
from tests.support.trainings import contents, cut_back, narrow, place

pytestmark = pytest.mark.usefixtures("quickly", "one_thread", "no_thread_stays")

WIDTHS = (0.05, 0.1)
CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=8,
    max_steps=10,
    lr=2e-3,
    ema_decay=0.9,
    masked_loss=False,
    log_every=4,
    checkpoint_every=4,
    ema_widths=WIDTHS,
    ema_snapshots=4,
)
STEPS = (3, 5, 8, 10)
FILES = [f"ema-width-{width}.safetensors" for width in WIDTHS]


@pytest.fixture(scope="module")
def whole(dataset: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)
        return folder, train(CONFIG, narrow(), dataset, LocalContext(folder))


def snapshot(folder: Path, step: int) -> Path:
    return folder / "snapshots" / f"step-{step:08d}"


def snapshots(folder: Path) -> dict[str, bytes]:
    files = (folder / "snapshots").rglob("*.safetensors")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_snapshots_are_due_at_shares_of_the_training() -> None:
    assert snapshot_steps(CONFIG, 10) == set(STEPS)
    many = CONFIG.model_copy(update={"ema_snapshots": 20})
    assert sorted(snapshot_steps(many, 400_000)) == list(range(20_000, 400_001, 20_000))
    assert snapshot_steps(many, 3) == {1, 2, 3}
    assert snapshot_steps(many, 0) == set()
    assert snapshot_steps(TrainConfig(), 400_000) == set()


def test_all_else_of_a_training_stays_as_it_is(
    whole: tuple[Path, TrainState], dataset: LatentDataset, tmp_path: Path
) -> None:
    """The ordinary average is still the one that is sampled and registered."""
    folder, state = whole
    without = train(CONFIG.model_copy(update={"ema_widths": ()}), narrow(), dataset, LocalContext(tmp_path))
    assert not (tmp_path / "snapshots").exists()
    for step in (4, 8, 10):
        ours, theirs = contents(place(folder, step)), contents(place(tmp_path, step))
        assert ours.keys() - theirs.keys() == set(FILES)
        for name in theirs.keys() - {"state.json", "checkpoint.json"}:
            assert ours[name] == theirs[name], name
    average = state.average()
    assert all(torch.equal(value, average[name]) for name, value in without.average().items())
    fields = result_fields(TrainConfig())
    assert "ema_widths" not in fields
    assert "ema_snapshots" not in fields


def test_an_average_follows_its_recursion_and_a_snapshot_is_its_bfloat16(whole: tuple[Path, TrainState]) -> None:
    folder, state = whole
    trained = {name for name, parameter in state.model.named_parameters() if parameter.requires_grad}
    assert trained < state.model.state_dict().keys()
    for place_of, width in enumerate(WIDTHS):
        name = f"ema-width-{width}.safetensors"
        average = load_checkpoint(place(folder, 10)).tensors[name]
        assert average.keys() == trained
        with opened_tensors(snapshot(folder, 10) / name) as file:
            assert json.loads(file.metadata()["average"]) == {"step": 10, "width": width}
        taken = load_tensors(snapshot(folder, 10) / name)
        assert taken.keys() == trained
        assert all(torch.equal(taken[key], value.bfloat16()) for key, value in average.items())
        assert all(torch.equal(state.ema.of_widths[place_of][key], value) for key, value in average.items())
    assert sorted(path.name for path in (folder / "snapshots").iterdir()) == [f"step-{step:08d}" for step in STEPS]


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 8), ("fp16", 11), ("fp32", 24)])
def test_a_snapshot_is_a_copy_in_its_precision(dtype: str, bits: int) -> None:
    config = CONFIG.model_copy(update={"ema_snapshot_dtype": dtype})
    averages = [{"w": torch.linspace(0.5, 1.5, 999)}, {"w": torch.linspace(-2, -1, 999)}]
    kept = [{name: value.clone() for name, value in average.items()} for average in averages]
    taken = Snapshot.of(1, config, averages)
    for average in averages:
        average["w"].zero_()
    for width, expected in zip(WIDTHS, kept, strict=True):
        error = (taken.averages[width]["w"].float() - expected["w"]) / expected["w"]
        assert 2.0 ** -(bits + 1) * (bits < 24) <= error.abs().max() <= 2.0**-bits


def test_the_recursion_is_that_of_the_paper(dataset: LatentDataset, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": 4, "checkpoint_every": 1})
    train(config, narrow(), dataset, LocalContext(tmp_path))
    name = "blocks.0.mlp.fc1.weight"
    for width in WIDTHS:
        expected = torch.zeros(())
        for step in range(1, 5):
            tensors = load_checkpoint(place(tmp_path, step)).tensors
            share = rate(exponent(width), step)
            expected = (1 - share) * expected + share * tensors["model.safetensors"][name]
            average = tensors[f"ema-width-{width}.safetensors"][name]
            assert torch.allclose(average, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step", [4, 8])  # between two snapshots, and at one
def test_a_resumed_training_has_the_same_snapshots(
    step: int, whole: tuple[Path, TrainState], dataset: LatentDataset, tmp_path: Path
) -> None:
    folder, state = whole
    context = cut_back(folder, tmp_path / "copy", step)
    assert context.store.newest() == step
    kept = {name for name in snapshots(folder) if int(name.split("/")[1][5:]) <= step}
    assert snapshots(tmp_path / "copy").keys() == kept, "younger ones are removed"
    resumed = train(CONFIG, narrow(), dataset, context)
    assert context.warnings == []
    assert snapshots(tmp_path / "copy") == snapshots(folder)
    assert contents(place(tmp_path / "copy", 10)) == contents(place(folder, 10))
    for average, expected in zip(resumed.ema.averages, state.ema.averages, strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in average.items())


def test_a_training_without_a_checkpoint_takes_all_snapshots_again(
    whole: tuple[Path, TrainState], dataset: LatentDataset, tmp_path: Path
) -> None:
    context = cut_back(whole[0], tmp_path / "copy", 0)
    train(CONFIG, narrow(), dataset, context)
    assert snapshots(tmp_path / "copy") == snapshots(whole[0])


def test_a_cut_snapshot_is_named_and_left_out(
    whole: tuple[Path, TrainState], dataset: LatentDataset, tmp_path: Path
) -> None:
    context = cut_back(whole[0], tmp_path / "copy", 8)
    path = snapshot(tmp_path / "copy", 3) / FILES[0]
    path.write_bytes(path.read_bytes()[:-7])
    train(CONFIG, narrow(), dataset, context)
    (warning,) = context.warnings
    assert "snapshots of the averages after 3 steps are missing or damaged" in warning
    assert {name.split("/")[1] for name in snapshots(tmp_path / "copy")} == {
        "step-00000005",
        "step-00000008",
        "step-00000010",
    }
    artifact = context.store.out.commit({}, {}, {})
    assert not artifact.problems(deep=True)


def test_a_damaged_journal_entry_of_another_file_does_not_end_the_training(
    whole: tuple[Path, TrainState], dataset: LatentDataset, tmp_path: Path
) -> None:
    """Only those of snapshots are read to find damaged snapshots."""
    context = cut_back(whole[0], tmp_path / "copy", 8)
    (context.store.out.data.local or Path()).joinpath(JOURNAL, "other.json").write_text("{")
    assert context.store.newest() == 8


def test_another_attempt_takes_the_snapshots_up_to_its_checkpoint(
    whole: tuple[Path, TrainState], tmp_path: Path
) -> None:
    before = cut_back(whole[0], tmp_path / "attempt", 8)
    damaged = snapshot(tmp_path / "attempt", 5) / FILES[1]
    damaged.write_bytes(damaged.read_bytes()[::-1])
    out = ArtifactWriter(Folder.at(tmp_path), "checkpoint", before.store.out.fingerprint, "again", ("attempt",))
    store = CheckpointStore(out, 2, lambda message: None)
    store.adopt()
    assert store.newest() == 8
    assert store.snapshots.whole(WIDTHS) == {3, 8}
    assert snapshots(tmp_path / "again") == {
        name: data
        for name, data in snapshots(whole[0]).items()
        if "step-00000010" not in name and name != f"snapshots/step-00000005/{FILES[1]}"
    }


def test_a_longer_training_does_not_continue_one_with_snapshots() -> None:
    """Its snapshots would be at other steps."""
    constant = {"lr_schedule": "constant"}
    assert _is_exact(TrainConfig(**constant))
    assert not _is_exact(TrainConfig(**constant, ema_widths=WIDTHS))


@pytest.mark.parametrize("widths", [[0.3], [0], [0.05, 0.05], ["wide"], [True]])
def test_widths_that_are_none_are_refused(widths: list[object]) -> None:
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.28"):
        TrainConfig(ema_widths=widths)


def test_one_width_needs_no_list() -> None:
    assert TrainConfig(ema_widths=0.05).ema_widths == (0.05,)


def test_the_estimate_counts_averages_and_snapshots() -> None:
    config = TrainConfig(model="EDT-Tiny/2", global_batch_size=8, ema_widths=WIDTHS)
    plain, needs = (estimate(each, narrow(), 100) for each in (config.model_copy(update={"ema_widths": ()}), config))
    state = initial_state(config, narrow())
    written = Snapshot.of(1, config, state.ema.of_widths).averages
    assert needs.snapshot == pytest.approx(sum(v.nbytes for a in written.values() for v in a.values()), rel=0.02)
    assert needs.snapshots == 20
    wide = config.model_copy(update={"ema_snapshot_dtype": "fp32"})
    assert estimate(wide, narrow(), 100).snapshot == 2 * needs.snapshot
    assert needs.ema == 3 * plain.ema
    assert needs.checkpoint - plain.checkpoint == needs.memory - plain.memory == 2 * plain.ema
    assert host_memory(needs, 1) - host_memory(plain, 1) == 2 * plain.ema + needs.snapshot
    assert "20 of the averages by width" in str(needs)
    assert "snapshots" not in str(plain)


def test_a_start_from_a_model_fills_every_average() -> None:
    """And the first step replaces those of widths: their time begins with this training."""
    state = initial_state(CONFIG, narrow())
    with torch.no_grad():
        state.ema.of_widths[0]["blocks.0.mlp.fc1.weight"].fill_(7.0)
    restart(state, CONFIG)
    weights = state.model.state_dict()
    for average in state.ema.averages:
        assert all(torch.equal(value, weights[name]) for name, value in average.items())
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1.0)
    state.ema.update(step=1)
    assert all(torch.equal(value, weights[name]) for name, value in state.ema.of_widths[1].items())
    assert not torch.equal(state.ema.averages[0]["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"])


def test_scales_are_taken_out_of_a_merged_model_again() -> None:
    state = initial_state(CONFIG.model_copy(update={"trainable": "difffit"}), narrow())
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in state.model.state_dict().items()
    }
    apart = unmerged(merged(weights), {name: weights[name] for name in state.trained or ()})
    assert apart.keys() == weights.keys()
    assert any(name.endswith("gamma") for name in apart)
    for name, value in weights.items():
        assert torch.allclose(apart[name], value, rtol=1e-6, atol=0), name
    gamma = next(name for name in weights if name.endswith("gamma"))
    weights[gamma][0] = 0
    with pytest.raises(UserError, match="has a 0"):
        unmerged(merged(weights), {gamma: weights[gamma]})
