"""A training that starts from a model: what becomes of its class rows, positions, averages and optimizer state."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.errors import Stopped, UserError
from edt_core.models import ModelConfig, build_model, model_config
from edt_core.training.checkpoint import load_checkpoint
from edt_core.training.context import LocalContext, Request
from edt_core.training.loop import train
from edt_core.training.start.base import Base, SavedOptimizer, class_rows
from edt_core.training.start.initial import initial_checkpoint
from edt_core.training.start.weights import label_table, resized_bias, resized_positions
from edt_core.training.state import initial_model
from tests.support.models import TINY, shallow_config
from tests.support.trainings import contents, narrow, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")

NAMES = ("ant", "bee", "cat", "dog")
CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=16,
    max_steps=6,
    lr=2e-3,
    ema_decay=(0.9, 0.5),
    log_every=2,
    checkpoint_every=2,
)


def base_of(config: ModelConfig, classes: tuple[str, ...] = NAMES, seed: int = 3, **more: Any) -> Base:
    """A model none of whose weights is zero."""
    model, rng = build_model(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return Base(config, model.state_dict(), "the base", classes, **more)


def started(config: ModelConfig, base: Base, names: tuple[str, ...] = NAMES, **fields: Any) -> Mapping[str, Tensor]:
    """The weights of step 0."""
    checkpoint, _ = initial_checkpoint(CONFIG.model_copy(update=fields), config, base, names)
    assert checkpoint.step == 0
    return checkpoint.tensors["model.safetensors"]


@pytest.mark.parametrize("name", TINY)
def test_the_same_model_takes_every_weight_and_every_average(name: str) -> None:
    config = shallow_config(name)
    base = base_of(config)
    checkpoint, rows = initial_checkpoint(CONFIG.model_copy(update={"masked_loss": False}), config, base, NAMES)
    assert (rows.new, rows.dropped) == ((), ())
    for file in ("model.safetensors", "ema.safetensors", "ema-0.5.safetensors"):
        assert same(dict(checkpoint.tensors[file]), dict(base.weights)), file


@pytest.mark.parametrize("name", TINY)
def test_class_rows_go_by_name(name: str) -> None:
    base = base_of(shallow_config(name))
    table, names = base.weights[label_table(build_model(base.config))], ("dog", "elk", "ant")
    weights = started(shallow_config(name, num_classes=3), base, names, masked_loss=False)
    made = weights[label_table(build_model(base.config))]
    assert torch.equal(made[[0, 2, 3]], table[[3, 0, 4]])  # dog, ant, and the null class
    mean = table[:-1].mean(dim=0)
    spread = float((table[:-1] - mean).square().mean().sqrt())
    assert 0.5 * spread < float((made[1] - mean).std()) < 2 * spread  # as distinct as a trained class
    others = {key: value for key, value in weights.items() if key != label_table(build_model(base.config))}
    assert same(others, {key: base.weights[key] for key in others})


def test_a_new_class_is_drawn_from_the_seed_and_its_name_alone() -> None:
    base, key = base_of(narrow()), "y_embedder.embedding_table.weight"
    one = started(replace(narrow(), num_classes=3), base, ("elk", "ant", "fox"))[key]
    other = started(replace(narrow(), num_classes=4), base, ("fox", "bee", "cat", "elk"))[key]
    assert torch.equal(one[0], other[3])
    assert torch.equal(one[2], other[0])
    assert not torch.equal(one[0], one[2])
    assert not torch.equal(one[0], started(replace(narrow(), num_classes=2), base, ("elk", "ant"), seed=1)[key][0])


def test_classes_that_are_new_or_dropped_are_named() -> None:
    rows = class_rows(base_of(narrow()), ("bee", "elk"), 2)
    assert (rows.rows, rows.new, rows.dropped) == ((1, None), ("elk",), ("ant", "cat", "dog"))
    assert str(rows) == (
        "1 of 2 classes take their rows from the base model; 1 are new (elk); 3 are dropped (ant, cat, dog)"
    )


def test_without_a_common_name_it_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"no class name in common: the base model has ant, bee, cat, dog, the images have 0, 1"
    ):
        class_rows(base_of(narrow()), ("0", "1"), 2)


@pytest.mark.parametrize(("classes", "names"), [((), NAMES), (NAMES, ()), ((), ())])
def test_where_names_are_not_known_the_numbers_must_be_equal(classes: tuple[str, ...], names: tuple[str, ...]) -> None:
    base = base_of(narrow(), classes)
    assert class_rows(base, names, 4).rows == (0, 1, 2, 3)
    if not names:
        with pytest.raises(UserError, match=r"has 4 classes and the new model has 5.*not known.*--images"):
            class_rows(base, names, 5)


def test_every_class_is_new_to_a_published_checkpoint_of_other_classes() -> None:
    """Its class names are not known. Its other weights are kept, and so is its null class."""
    base, model = base_of(narrow(), ()), replace(narrow(), num_classes=2)
    rows = class_rows(base, ("elk", "gnu"), 2)
    assert (rows.rows, rows.new, rows.dropped) == ((None, None), ("elk", "gnu"), ())
    assert str(rows) == "0 of 2 classes take their rows from the base model; 2 are new (elk, gnu)"
    weights, key = started(model, base, ("elk", "gnu")), "y_embedder.embedding_table.weight"
    mean = base.weights[key][:-1].mean(dim=0)
    assert torch.equal(weights[key][-1], base.weights[key][-1])
    for row in weights[key][:-1]:
        assert 0 < (row - mean).abs().max() < 1
    assert all(torch.equal(value, base.weights[name]) for name, value in weights.items() if name != key)


@pytest.mark.parametrize("name", TINY)
def test_another_image_size_fits(name: str) -> None:
    """What is fixed is that of a new model; what is learned is interpolated, and finite; all else is copied."""
    base, config = base_of(shallow_config(name, 32)), shallow_config(name, 64)
    weights, fresh = started(config, base, masked_loss=False), build_model(config)
    fixed = dict(fresh.named_buffers())
    for key, value in weights.items():
        before = base.weights[key]
        if key in fixed:
            assert torch.equal(value, fixed[key]), key
        elif value.shape == before.shape:
            assert torch.equal(value, before), key
        else:
            assert "pos_embed" in key or key.endswith("relative_position_bias_table"), key
            assert float(value.min()) >= float(before.min()) - float(before.std())
            assert float(value.max()) <= float(before.max()) + float(before.std())
    fresh.load_state_dict(weights)
    resized = [key for key, value in weights.items() if value.shape != base.weights[key].shape]
    assert resized


def test_interpolation_keeps_what_has_no_place_and_what_is_the_same_everywhere() -> None:
    flat = torch.cat([torch.arange(6.0).view(1, 2, 3), torch.ones(1, 16, 3)], dim=1)
    larger = resized_positions(flat, 4, 8)
    assert torch.equal(larger[:, :2], flat[:, :2])
    torch.testing.assert_close(larger[:, 2:], torch.ones(1, 64, 3))
    table = torch.cat([torch.full((49, 2), 0.5), torch.tensor([[7.0, 8.0]] * 3)])
    wider = resized_bias(table, 15, 15**2 + 3)
    torch.testing.assert_close(wider[:-3], torch.full((225, 2), 0.5))
    assert torch.equal(wider[-3:], table[-3:])
    # A slope along the rows stays one, along the columns nothing moves, and the offset 0 keeps its value.
    slope = torch.arange(-3.0, 4).repeat_interleave(7).unsqueeze(1)
    steeper = resized_bias(slope, 15, 225).view(15, 15)
    assert float(steeper[7, 7]) == pytest.approx(0.0, abs=1e-6)
    assert float(steeper.double().std(dim=1).max()) == pytest.approx(0.0, abs=1e-6)
    assert bool((steeper.diff(dim=0) > 0).all())


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (model_config("DiT-Tiny/2", 32, 4), "architecture 'dit', and the new model has 'edt'"),
        (replace(narrow(), in_channels=8), "in_channels 8, and the new model has 4"),
        (replace(narrow(), latent_size=32, autoencoder_factor=1), "autoencoder_factor 1, and the new model has 4"),
        (replace(narrow(), latent_size=16, patch_size=4), "patch_size 4, and the new model has 2"),
        (replace(narrow(), objective="v_prediction"), "objective 'v_prediction', and the new model has 'epsilon'"),
        (
            replace(narrow(), depths=(1, 2, 1, 1, 1)),
            r"depths \(1, 2, 1, 1, 1\), and the new model has \(1, 1, 1, 1, 1\)",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_both_values(other: ModelConfig, told: str) -> None:
    with pytest.raises(UserError, match=told):
        started(narrow(), base_of(other))


def test_weights_that_are_not_whole_are_refused() -> None:
    base = base_of(narrow())
    lacking = {key: value for key, value in base.weights.items() if not key.startswith("t_embedder")}
    with pytest.raises(UserError, match=r"4 tensors are missing \['t_embedder.mlp.0.bias'"):
        started(narrow(), replace(base, weights=lacking))


# --- trained on


@pytest.fixture(scope="module")
def whole(dataset: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training from a base model, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, dataset)
    return folder


def run(folder: Path, dataset: LatentDataset, context: LocalContext | None = None, **fields: Any) -> None:
    config = CONFIG.model_copy(update=fields)
    base = base_of(narrow(), seed=5)
    context = context or LocalContext(folder)
    train(config, narrow(), dataset, context, lambda: initial_checkpoint(config, narrow(), base, NAMES)[0])


def test_a_training_begins_with_the_base_model(whole: Path, dataset: LatentDataset, tmp_path: Path) -> None:
    run(tmp_path / "one", dataset, max_steps=1, lr=1e-12, checkpoint_every=1)
    weights, base = load_checkpoint(place(tmp_path / "one", 1)).tensors["model.safetensors"], base_of(narrow(), seed=5)
    for key, value in base.weights.items():
        torch.testing.assert_close(weights[key], value, atol=1e-6, rtol=1e-6)
    random = initial_model(narrow(), CONFIG.seed).state_dict()
    assert not same(dict(load_checkpoint(place(whole, 2)).tensors["model.safetensors"]), random)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_equals_an_uninterrupted_one(
    stop: int, whole: Path, dataset: LatentDataset, tmp_path: Path
) -> None:
    """Stopped before its first regular checkpoint, and after it."""
    asked = iter([Request.NOTHING] * (stop - 1) + [Request.STOP])
    with pytest.raises(Stopped):
        run(tmp_path, dataset, LocalContext(tmp_path, request=lambda: next(asked)))
    run(tmp_path, dataset)
    for step in (4, 6):
        assert contents(place(tmp_path, step)) == contents(place(whole, step))


def test_a_rollback_to_the_start_is_to_the_base_model(
    dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is not finite: what follows equals a training that left it out, not one from random weights."""
    from edt_core.training import trainer

    step, failed = trainer.Trainer.train_step, []

    def once(self: trainer.Trainer, batch: Any, draws: Any) -> Any:
        if batch.step == 1 and not failed:
            failed.append(1)
            raise trainer.NotFiniteError(1, "the loss of step 1 is not finite")
        return step(self, batch, draws)

    monkeypatch.setattr(trainer.Trainer, "train_step", once)
    run(tmp_path, dataset, max_steps=2, lr=1e-12)
    weights = load_checkpoint(place(tmp_path, 2)).tensors["model.safetensors"]
    for key, value in base_of(narrow(), seed=5).weights.items():
        torch.testing.assert_close(weights[key], value, atol=1e-6, rtol=1e-6)


# --- the optimizer's state


def kept(folder: Path, step: int, classes: tuple[str, ...] = NAMES, optimizer: str = "adan") -> Base:
    checkpoint = load_checkpoint(place(folder, step))
    saved = SavedOptimizer(optimizer, checkpoint.tensors["optimizer.safetensors"], checkpoint.state["optimizer_groups"])
    return Base(narrow(), checkpoint.tensors["model.safetensors"], "a checkpoint", classes, saved)


def test_the_optimizer_s_state_is_kept_with_its_counters(whole: Path) -> None:
    config = CONFIG.model_copy(update={"init_optimizer": "keep", "weight_decay": 0.25})
    checkpoint, _ = initial_checkpoint(config, narrow(), kept(whole, 6), NAMES)
    before = load_checkpoint(place(whole, 6))
    assert same(dict(checkpoint.tensors["optimizer.safetensors"]), dict(before.tensors["optimizer.safetensors"]))
    (group,), (old,) = checkpoint.state["optimizer_groups"], before.state["optimizer_groups"]
    assert group["weight_decay"] == 0.25
    assert group.get("step") == old.get("step")


def test_the_state_of_class_rows_moves_with_them(whole: Path) -> None:
    config = CONFIG.model_copy(update={"init_optimizer": "keep"})
    names, order = ("cat", "dog", "ant", "bee"), [2, 3, 0, 1, 4]
    checkpoint, _ = initial_checkpoint(config, narrow(), kept(whole, 6), names)
    model = build_model(narrow())
    table = [name for name, _ in model.named_parameters()].index(label_table(model))
    key = f"{table}.exp_avg"
    before = load_checkpoint(place(whole, 6)).tensors["optimizer.safetensors"][key]
    assert torch.equal(checkpoint.tensors["optimizer.safetensors"][key], before[order])


def test_an_optimizer_s_state_that_does_not_fit_is_refused(whole: Path) -> None:
    config = CONFIG.model_copy(update={"init_optimizer": "keep"})
    wrong = {
        "has no optimizer state": replace(kept(whole, 6), optimizer=None),
        "has the state of adamw, and train.optimizer is adan": kept(whole, 6, optimizer="adamw"),
        r"has other classes: .*1 are new \(dog\); 1 are dropped \(elk\)": kept(whole, 6, ("ant", "bee", "cat", "elk")),
    }
    for told, base in wrong.items():
        with pytest.raises(UserError, match=rf"init_optimizer is keep, but a checkpoint {told}.*init_optimizer=fresh"):
            initial_checkpoint(config, narrow(), base, NAMES)
    with pytest.raises(UserError, match=r"has a state of shape .* for blocks.*relative_position_bias_table"):
        initial_checkpoint(config, replace(narrow(), latent_size=16), kept(whole, 6), NAMES)
