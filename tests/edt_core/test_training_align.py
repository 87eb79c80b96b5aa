"""Trainings with an alignment: they learn, resume bit for bit, and leave nothing of the head in the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.diffusion import with_objective
from edt_core.models import ModelConfig, build_model
from edt_core.store.artifact import Artifact
from edt_core.training import loop
from edt_core.training.checkpoint import ema_model, load_checkpoint
from edt_core.training.context import LocalContext
from edt_core.training.loop import TrainState, train
from edt_core.training.ranks import Ranks
from edt_core.training.speed import compiled
from edt_core.training.speed.update import CompiledUpdate
from edt_core.training.start.initial import initial_checkpoint
from tests.edt_core.test_training_start import NAMES, base_of
from tests.support.cases import suite_of
from tests.support.local_training import trained_here
from tests.support.models import BESIDE_EDT, pipeline_folder, shallow_config
from tests.support.trainings import OneOfOne, contents, cut_back, narrow, place, plain_update, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")

HEAD = "align_head.safetensors"
CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=16,
    max_steps=4,
    lr=2e-3,
    ema_decay=(0.9, 0.5),
    log_every=1,
    checkpoint_every=2,
    max_grad_norm=1.0,
    align="self",
)
FEW = CONFIG.model_copy(update={"global_batch_size": 8})


def run(
    folder: Path, dataset: LatentDataset, shape: ModelConfig, ranks: Ranks | None = None, **fields: Any
) -> TrainState:
    config = FEW.model_copy(update={"model": shape.name, "masked_loss": shape.is_masked, **fields})
    return train(config, shape, dataset, LocalContext(folder, ranks or Ranks()))


def column(state: TrainState, name: str) -> list[float]:
    return [row[name] for row in state.history.rows]


BLOCKS = {"align_distance": "channel_cosine", "align_block": 1, "align_target_block": 4}
NARROWER = {"precision": "bf16", "activation_checkpointing": True, "optimizer": "adamw"}
FLOW = {"objective": "flow", "timestep_sampler": "uniform", "min_snr_gamma": None}
OPTIONS: list[dict[str, Any]] = [
    {"align": "autoencoder", "align_distance": "cosine", "micro_batch_size": 3},
    {**BLOCKS, **NARROWER},
    {**FLOW, "optimizer": "muon"},
]
APART: list[dict[str, Any]] = [
    {"align": "autoencoder"},
    BLOCKS,
    NARROWER,
    FLOW,
    {"objective": "v_prediction", "optimizer": "muon"},
]


@pytest.mark.parametrize("options", suite_of(OPTIONS, OPTIONS + APART), ids=str)
def test_it_resumes_bit_for_bit(options: dict[str, Any], dataset: LatentDataset, tmp_path: Path) -> None:
    """Head and optimizer included. A checkpoint has the head in a file of its own."""
    shape = with_objective(narrow(), str(options.get("objective", "epsilon")))
    whole = run(tmp_path / "a", dataset, shape, **options)
    config = FEW.model_copy(update=options)
    resumed = train(config, shape, dataset, cut_back(tmp_path / "a", tmp_path / "b", 2))
    assert contents(place(tmp_path / "a", 4)) == contents(place(tmp_path / "b", 4))
    assert whole.history == resumed.history
    first, last = (load_checkpoint(place(tmp_path / "a", step)).tensors[HEAD] for step in (2, 4))
    assert first.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not any(torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "align"),
    [
        ("EDT-Tiny/2", "autoencoder"),
        ("MDTv2-Tiny/2", "self"),
        ("UViT-Tiny/2", "self"),
        pytest.param("EDT-Tiny/2", "self", marks=pytest.mark.slow),  # as test_it_resumes_bit_for_bit
        pytest.param("DiT-Tiny/2", "self", marks=pytest.mark.slow),  # as the compiled parts
        *(pytest.param(name, "autoencoder", marks=pytest.mark.slow) for name in BESIDE_EDT),
    ],
)
def test_every_family_learns_it(name: str, align: str, dataset: LatentDataset, tmp_path: Path) -> None:
    shape = narrow() if name.startswith("EDT") else shallow_config(name)
    state = run(tmp_path, dataset, shape, align=align, max_steps=16, checkpoint_every=16)
    align_term, loss = column(state, "align"), column(state, "loss")
    assert all(value > 0 for value in align_term)
    assert sum(align_term[-4:]) < 0.98 * sum(align_term[:4])
    assert sum(loss[-4:]) < sum(loss[:4])
    for row in state.history.rows:
        full = row["loss_full"] if shape.is_masked else row["loss"]
        assert full == pytest.approx(row["mse"] + row["vb"] + row["align"], rel=1e-6)


@pytest.mark.parametrize("align", suite_of(["self"], ["autoencoder", "self"]))
def test_a_weight_of_zero_trains_the_model_of_a_training_without(
    align: str, dataset: LatentDataset, tmp_path: Path
) -> None:
    """Bit for bit. Its timesteps are drawn by the same losses; gradients are not clipped, whose norm has more terms."""
    off = run(tmp_path / "off", dataset, narrow(), align=None, max_grad_norm=None)
    zero = run(tmp_path / "zero", dataset, narrow(), align=align, align_weight=0.0, max_grad_norm=None)
    some = run(tmp_path / "some", dataset, narrow(), align=align, max_grad_norm=None)
    assert same(off.model.state_dict(), zero.model.state_dict())
    assert all(same(a, b) for a, b in zip(off.ema.averages, zero.ema.averages, strict=True))
    assert not same(off.model.state_dict(), some.model.state_dict())
    assert column(zero, "align") == [0.0] * 4
    assert column(zero, "loss") == column(off, "loss")
    assert HEAD not in contents(place(tmp_path / "off", 4))


def test_the_head_is_in_no_model_that_a_training_leaves(latents_artifact: Artifact, tmp_path: Path) -> None:
    config = FEW.model_copy(update={"model": "DiT-Tiny/2", "masked_loss": False})
    artifact = trained_here(config, latents_artifact, tmp_path / "artifact")
    final = artifact.directory(artifact.counts["final"])
    names = build_model(ema_model(final).config).state_dict().keys()
    for file in ("model.safetensors", "ema.safetensors", "ema-0.5.safetensors"):
        assert load_file(final / file).keys() == names
    assert (final / HEAD).exists()
    packed = pipeline_folder(tmp_path / "pipeline", ema_model(final))
    stored = [path for path in packed.rglob("*.safetensors") if "vae" not in path.parts]
    assert [len(load_file(path)) for path in stored] == [len(names)]
    assert {key.removeprefix("edt.") for key in load_file(stored[0])} == names
    assert not [path.name for path in packed.rglob("*") if HEAD in path.name]


def test_few_trained_parameters_and_a_head_that_begins_fresh(dataset: LatentDataset, tmp_path: Path) -> None:
    """DiffFit: the averaged model has its scales merged at each step."""
    config = FEW.model_copy(update={"trainable": "difffit", "lr": 1e-2})
    base = base_of(narrow(), seed=5, digest="d" * 64)

    def fit(context: LocalContext) -> TrainState:
        return train(config, narrow(), dataset, context, lambda: initial_checkpoint(config, narrow(), base, NAMES)[0])

    whole = fit(LocalContext(tmp_path / "a"))
    fit(cut_back(tmp_path / "a", tmp_path / "b", 2))
    assert contents(place(tmp_path / "a", 4)) == contents(place(tmp_path / "b", 4))
    start, _ = initial_checkpoint(config, narrow(), base, NAMES)
    assert whole.aligned is not None
    head = whole.aligned.head.state_dict()
    assert start.tensors[HEAD].keys() == head.keys()
    assert not any(torch.equal(start.tensors[HEAD][name], head[name]) for name in head)
    assert not [name for name in whole.ema.averages[0] if "head" in name]


@pytest.mark.usefixtures("group_of_one")
def test_an_exchange_of_gradients_trains_the_same_bits(dataset: LatentDataset, tmp_path: Path) -> None:
    """The head is inside what DDP wraps; with micro-batches the last one exchanges its gradients too."""
    fields: dict[str, Any] = {"micro_batch_size": 3}
    alone = run(tmp_path / "alone", dataset, narrow(), **fields)
    wrapped = run(tmp_path / "wrapped", dataset, narrow(), OneOfOne(), **fields)
    assert same(alone.model.state_dict(), wrapped.model.state_dict())
    assert contents(place(tmp_path / "alone", 4)) == contents(place(tmp_path / "wrapped", 4))


def test_compiled_parts_and_update_train_the_same(
    dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The averaged model is compiled too, and the compiled update takes the head, which has no average."""
    shape, updates = shallow_config("DiT-Tiny/2"), list[CompiledUpdate]()

    def update(*inputs: Any, **options: Any) -> CompiledUpdate:
        updates.append(plain_update(*inputs, **options))
        return updates[-1]

    monkeypatch.setattr(loop, "compile_parts", partial(compiled.compile_parts, backend="eager"))
    monkeypatch.setattr(loop, "CompiledUpdate", update)
    context = LocalContext(tmp_path / "compiled")
    config = FEW.model_copy(update={"model": shape.name, "masked_loss": False, "compile": True})
    ours = train(config, shape, dataset, context)
    theirs = run(tmp_path / "eager", dataset, shape)
    assert not context.warnings
    assert len(updates) == 1
    assert column(ours, "loss") == pytest.approx(column(theirs, "loss"), rel=1e-4)
    assert ours.aligned is not None
    assert theirs.aligned is not None
    for mine, other in zip(ours.aligned.head.parameters(), theirs.aligned.head.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4)
        assert not torch.equal(mine, torch.zeros_like(mine))
    assert len(ours.ema.averages[0]) == len(ours.model.state_dict())
